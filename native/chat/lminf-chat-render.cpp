#include "lminf-chat-render.h"

#include "json.h"
#include "jinja/runtime.h"

#include <map>
#include <memory>
#include <set>
#include <utility>

static const char * const GENERATION_PROMPT = "add_generation_prompt";

struct rendered {
    const jinja::program * prog;
    common_json_value      inputs; // without add_generation_prompt

    std::map<std::string, std::string> texts; // by add_generation_prompt in JSON, "" without it

    // after the first n_done statements, which do not know of add_generation_prompt
    std::unique_ptr<jinja::context> ctx;
    jinja::value_array results;
    size_t n_done = 0;
};

struct memory {
    bool is_open = false;
    std::unique_ptr<rendered> last;
};

static thread_local memory remembered;

lminf_chat_memory::lminf_chat_memory() {
    remembered.is_open = true;
}

lminf_chat_memory::~lminf_chat_memory() {
    remembered = {};
}

// Whether executing a statement changes nothing but the variables of its context: no value, of which there may be copies.
static bool is_pure(const jinja::statement & statement) {
    static const std::set<std::string> pure = {
        "BinaryExpression", "Comment", "Identifier", "If", "IntegerLiteral", "MemberExpression", "Noop", "StringLiteral",
        "TestExpression", "UnaryExpression",
    };
    bool is = true;
    jinja::context ctx;
    ctx.visitor = [&](bool, const jinja::statement * node, const std::vector<jinja::visitor_pair> & children) {
        is = is && pure.count(node->type());
        for (const auto & [label, nodes] : children) {
            for (const auto * child : nodes) {
                if (is && child) {
                    child->visit(ctx);
                }
            }
        }
    };
    statement.visit(ctx);
    return is;
}

// The statements before the first that may know of add_generation_prompt; 0 if those after them could not be executed twice.
static size_t count_common(const jinja::program & prog, const std::string & source) {
    const auto & body = prog.body;
    const size_t use  = source.find(GENERATION_PROMPT);
    size_t n = 0;
    while (n < body.size() && (n + 1 < body.size() ? body[n + 1]->pos <= use : use == std::string::npos)) {
        ++n;
    }
    for (size_t i = n; i < body.size(); ++i) {
        if (!is_pure(*body[i])) {
            return 0;
        }
    }
    return n;
}

static void execute(jinja::context & ctx, const jinja::program & prog, size_t begin, size_t end, const jinja::value_array & results) {
    for (size_t i = begin; i < end; ++i) {
        results->push_back(prog.body[i]->execute(ctx));
    }
}

std::string lminf_chat_render(
        jinja::context & ctx, const jinja::program & prog, const std::string & source, common_json & inputs, bool mark_input) {
    common_json generation = common_json::object();
    if (inputs.contains(GENERATION_PROMPT)) {
        generation[GENERATION_PROMPT] = inputs.at(GENERATION_PROMPT);
        inputs.erase(GENERATION_PROMPT);
    }
    const std::string which = generation.dump_safe();

    auto known = std::move(remembered.last); // if rendering fails, nothing is
    if (known && (known->prog != &prog || !(inputs == known->inputs))) {
        known.reset();
    }
    if (known && known->texts.count(which)) {
        remembered.last = std::move(known);
        return remembered.last->texts[which];
    }
    if (!known) {
        known = std::make_unique<rendered>(rendered { &prog, nullptr, {}, nullptr, jinja::mk_val<jinja::value_array>(), 0 });
        jinja::global_from_json(ctx, inputs, mark_input);
        known->n_done = remembered.is_open ? count_common(prog, source) : 0;
        execute(ctx, prog, 0, known->n_done, known->results);
        known->ctx    = std::make_unique<jinja::context>(ctx);
        known->inputs = std::move(inputs);
    } else if (known->n_done == 0) {
        jinja::global_from_json(ctx, inputs, mark_input); // values of its own
    }

    jinja::context end(known->n_done ? *known->ctx : ctx);
    jinja::global_from_json(end, generation, mark_input);
    auto results = jinja::mk_val<jinja::value_array>(known->results->as_array());
    execute(end, prog, known->n_done, prog.body.size(), results);
    auto text = jinja::runtime::gather_string_parts(results)->as_string().str();
    if (remembered.is_open) {
        known->texts[which] = text;
        remembered.last     = std::move(known);
    }
    return text;
}
