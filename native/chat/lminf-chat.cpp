#include "lminf-chat.h"

#include "lminf-chat-budget.h"
#include "lminf-chat-json.h"
#include "lminf-chat-work.h"

#include "chat.h"
#include "json-schema-to-grammar.h"
#include "json.h"

#include "jinja/lexer.h"
#include "jinja/parser.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>

using json = common_json;

static constexpr size_t MAX_TEMPLATE_BYTES  = 1 << 20;
static constexpr size_t MAX_STATEMENT_PARTS = 4000; // an expression nests as deep as it is long, and is freed recursively

struct lminf_chat {
    common_chat_templates_ptr templates;
    std::map<std::string, bool> caps;
};

struct lminf_chat_parser {
    common_chat_parser_params params;
};

// --- texts ------------------------------------------------------------------------------------------------------------

char * lminf_chat_copied(const std::string & text) {
    auto * copy = static_cast<char *>(std::malloc(text.size() + 1));
    if (copy) {
        std::memcpy(copy, text.c_str(), text.size() + 1);
    }
    return copy;
}

char * lminf_chat_error(const std::string & reason, bool too_much) {
    try {
        json error = json::object();
        error["error"]    = reason;
        error["too_much"] = too_much;
        return lminf_chat_copied(error.dump_safe());
    } catch (...) {
        return lminf_chat_copied("{\"error\": \"out of memory\", \"too_much\": true}");
    }
}

void lminf_chat_free_text(char * text) {
    std::free(text);
}

// --- templates --------------------------------------------------------------------------------------------------------

static void check_template(const std::string & text) {
    if (text.size() > MAX_TEMPLATE_BYTES) {
        throw lminf_chat_too_much { "this chat template is too long" };
    }
    jinja::lexer lexer;
    const auto lexed = lexer.tokenize(text);
    size_t n_parts = 0;
    for (const auto & token : lexed.tokens) {
        const bool begins = token.t == jinja::token::open_statement || token.t == jinja::token::open_expression;
        n_parts = begins ? 0 : n_parts + 1;
        if (n_parts > MAX_STATEMENT_PARTS) {
            throw lminf_chat_too_much { "a statement of this chat template is too long" };
        }
    }
    jinja::parse_from_tokens(lexed); // common_chat_templates_init would lose the reason
}

lminf_chat * lminf_chat_init(const llama_model * model, const char * text, const char * bos, const char * eos, char ** error) {
    lminf_chat_budget budget(0, nullptr, nullptr);
    lminf_chat * chat = nullptr;
    char * failure = lminf_chat_guarded([&]() {
        for (const char * each : {
                text && *text ? text : nullptr,
                model ? llama_model_chat_template(model, nullptr) : nullptr,
                model ? llama_model_chat_template(model, "tool_use") : nullptr }) {
            check_template(each ? each : "");
        }
        auto made = std::make_unique<lminf_chat>();
        made->templates = common_chat_templates_init(model, text ? text : "", bos ? bos : "", eos ? eos : "");
        made->caps      = common_chat_templates_get_caps(made->templates.get());
        chat = made.release();
        return std::string();
    });
    if (chat) {
        lminf_chat_free_text(failure);
        return chat;
    }
    *error = failure;
    return nullptr;
}

void lminf_chat_free(lminf_chat * chat) {
    delete chat;
}

char * lminf_chat_info(const lminf_chat * chat) {
    lminf_chat_budget budget(0, nullptr, nullptr);
    return lminf_chat_guarded([&]() {
        const auto * templates = chat->templates.get();
        json info = json::object();
        info["source"]      = common_chat_templates_source(templates);
        info["tool_source"] = common_chat_templates_source(templates, "tool_use");
        info["explicit"]    = common_chat_templates_was_explicit(templates);
        info["caps"]        = chat->caps;
        info["thinks"]      = false;
        try {
            info["thinks"] = common_chat_templates_support_enable_thinking(templates);
        } catch (const std::exception &) {
            // a template may refuse the conversation that is tried; it says so where it is used
        }
        return info.dump_safe();
    });
}

// --- prompts ----------------------------------------------------------------------------------------------------------

static common_chat_templates_inputs inputs_of(const lminf_chat & chat, const json & request) {
    common_chat_templates_inputs inputs;
    const auto caps = chat.caps.find("supports_parallel_tool_calls");

    inputs.messages               = common_chat_msgs_parse_oaicompat(request.at("messages"));
    inputs.tools                  = common_chat_tools_parse_oaicompat(request.value("tools", json()));
    inputs.tool_choice            = common_chat_tool_choice_parse_oaicompat(request.value("tool_choice", "auto"));
    inputs.parallel_tool_calls    = request.value("parallel_tool_calls", caps != chat.caps.end() && caps->second);
    inputs.add_generation_prompt  = request.value("add_generation_prompt", true);
    inputs.continue_final_message = common_chat_continuation_parse(request.value("continue_final_message", json()));
    inputs.reasoning_format       = common_reasoning_format_from_name(request.value("reasoning_format", "auto"));
    inputs.enable_thinking        = request.value("enable_thinking", true);
    if (request.contains("json_schema")) {
        inputs.json_schema = request.at("json_schema").dump();
    }
    if (request.contains("template_kwargs")) {
        for (const auto & [key, value] : request.at("template_kwargs").items()) {
            inputs.chat_template_kwargs[key] = value.dump();
        }
    }
    return inputs;
}

static void check_schema_enforced() {
    if (lminf_chat_warned_of_schema()) {
        throw std::invalid_argument("a pattern of this schema cannot be enforced");
    }
}

static const char * trigger_name(common_grammar_trigger_type type) {
    switch (type) {
        case COMMON_GRAMMAR_TRIGGER_TYPE_WORD:         return "word";
        case COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN:      return "pattern";
        case COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN_FULL: return "full";
        case COMMON_GRAMMAR_TRIGGER_TYPE_TOKEN:        break; // of llama-server's own
    }
    throw std::logic_error("a trigger of an unknown kind");
}

char * lminf_chat_apply(
        const lminf_chat * chat, const char * request, const char * const * contents, size_t n_contents, char ** prompt,
        size_t * n_prompt, lminf_chat_cancelled is_cancelled, void * data) {
    *prompt = nullptr;
    size_t n_bytes = std::strlen(request);
    for (size_t i = 0; i < n_contents; ++i) {
        n_bytes += contents[i] ? std::strlen(contents[i]) : 0;
    }
    lminf_chat_budget budget(n_bytes, is_cancelled, data);
    return lminf_chat_guarded([&]() {
        auto inputs = inputs_of(*chat, json::parse(request));
        for (size_t i = 0; i < std::min(n_contents, inputs.messages.size()); ++i) {
            if (contents[i]) {
                inputs.messages[i].content = contents[i];
            }
        }
        lminf_chat_warned_of_schema();
        lminf_chat_memory memory;
        const auto params = common_chat_templates_apply(chat->templates.get(), inputs);
        if (!inputs.json_schema.empty()) {
            check_schema_enforced();
        }

        json parser = json::object();
        parser["format"]            = static_cast<int>(params.format);
        parser["reasoning_format"]  = static_cast<int>(inputs.reasoning_format);
        parser["generation_prompt"] = params.generation_prompt;
        parser["parse_tool_calls"]  = !inputs.tools.empty() && inputs.tool_choice != COMMON_CHAT_TOOL_CHOICE_NONE;
        parser["arena"]             = params.parser;

        json triggers = json::array();
        for (const auto & trigger : params.grammar_triggers) {
            triggers.push_back({ { "type", trigger_name(trigger.type) }, { "value", trigger.value } });
        }

        json result = json::object();
        result["generation_prompt"] = params.generation_prompt;
        result["grammar"]           = params.grammar;
        result["grammar_lazy"]      = params.grammar_lazy;
        result["triggers"]          = triggers;
        result["preserved_tokens"]  = params.preserved_tokens;
        result["stops"]             = params.additional_stops;
        result["thinking_start"]    = params.thinking_start_tag;
        result["thinking_ends"]     = params.thinking_end_tags;
        result["parser"]            = parser.dump_safe();
        auto made = result.dump_safe();
        *prompt   = lminf_chat_copied(params.prompt);
        *n_prompt = params.prompt.size();
        return made;
    });
}

// --- answers ----------------------------------------------------------------------------------------------------------

lminf_chat_parser * lminf_chat_parser_init(const char * text, char ** error) {
    lminf_chat_budget budget(std::strlen(text), nullptr, nullptr);
    lminf_chat_parser * parser = nullptr;
    char * failure = lminf_chat_guarded([&]() {
        const json saved = json::parse(text);
        auto made = std::make_unique<lminf_chat_parser>();
        made->params.format            = static_cast<common_chat_format>(saved.at("format").get<int>());
        made->params.reasoning_format  = static_cast<common_reasoning_format>(saved.at("reasoning_format").get<int>());
        made->params.generation_prompt = saved.at("generation_prompt").get<std::string>();
        made->params.parse_tool_calls  = saved.at("parse_tool_calls").get<bool>();
        const auto arena = saved.at("arena").get<std::string>();
        if (!arena.empty()) {
            made->params.parser.load(arena);
        }
        parser = made.release();
        return std::string();
    });
    if (parser) {
        lminf_chat_free_text(failure);
        return parser;
    }
    *error = failure;
    return nullptr;
}

void lminf_chat_parser_free(lminf_chat_parser * parser) {
    delete parser;
}

char * lminf_chat_parse(lminf_chat_parser * parser, const char * text, bool is_partial) {
    lminf_chat_budget budget(std::strlen(text), nullptr, nullptr);
    return lminf_chat_guarded([&]() {
        const auto message = common_chat_parse(text, is_partial, parser->params);
        json calls = json::array();
        for (const auto & call : message.tool_calls) {
            calls.push_back({ { "id", call.id }, { "name", call.name }, { "arguments", call.arguments } });
        }
        json result = json::object();
        result["content"]           = message.render_content();
        result["reasoning_content"] = message.reasoning_content;
        result["tool_calls"]        = calls;
        return result.dump_safe();
    });
}

// --- grammars ---------------------------------------------------------------------------------------------------------

char * lminf_chat_schema(const char * schema, lminf_chat_cancelled is_cancelled, void * data) {
    lminf_chat_budget budget(std::strlen(schema), is_cancelled, data);
    return lminf_chat_guarded([&]() {
        json result = json::object();
        lminf_chat_warned_of_schema();
        result["grammar"] = json_schema_to_grammar(json::parse(schema), true);
        check_schema_enforced();
        return result.dump_safe();
    });
}
