// Every architecture of llama.cpp as a tiny random model: does it run with a Λ cache, and does it do what it should?
//
//   test-archs --list          all models, one name a line: ARCH or ARCH/VARIANT
//   test-archs NAME            checks one of them and prints what it found as one line of JSON
//   test-archs --random NAME [ROUNDS [SEED]]
//                              random operations on several sequences, each round against a fresh run
//   test-archs --device DEVICE ...
//                              each of them with all layers there, and compared with the CPU as well; ggml's name: CUDA0
//
// What is expected of whom, and how large an error may be, is in tests/native/architectures.json;
// tests/native/test_archs.py compares.

#include "archs/context.h"
#include "archs/generator.h"
#include "archs/random.h"

#include "llama-ext.h"
#include "llama-model.h"

#include "lminf-attn.h"

#include <cstring>
#include <functional>

//
// what is printed
//

static std::string quoted(const std::string & text) {
    std::string res = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') {
            res += '\\';
        }
        res += c == '\n' ? ' ' : c;
    }
    return res + "\"";
}

static std::string number(double value) {
    if (!std::isfinite(value)) {
        return quoted("not a number"); // passes no comparison
    }
    char text[32];
    snprintf(text, sizeof(text), "%.3g", value);
    return text;
}

static std::string number(uint64_t value) { return std::to_string(value); }

class json_object {
public:
    void add(const char * key, const std::string & json) { fields.push_back({ key, json }); }

    std::string str() const {
        std::string res;
        for (const auto & [key, json] : fields) {
            res += (res.empty() ? "" : ", ") + quoted(key) + ": " + json;
        }
        return "{" + res + "}";
    }

private:
    std::vector<std::pair<std::string, std::string>> fields;
};

//
// the checks: each returns a figure, or throws what is wrong
//

static ggml_backend_dev_t device = nullptr; // NULL: the CPU

// of any of them; what they need less of, they take the beginning of
static const tokens text  = random_tokens(4000, 7);
static const tokens other = random_tokens(1000, 8);

static void require(bool condition, const std::string & what) {
    if (!condition) {
        throw std::runtime_error(what);
    }
}

// while everything is in the window, sinks and window are full attention
static double equals_stock(llama_model * model) {
    const size_t n = 600;

    context_params stock;
    stock.n_local = 0;

    context_params lambda;
    lambda.n_local = 640;

    return error_between(context(model, stock).read(text, 0, n, 30), context(model, lambda).read(text, 0, n, 30));
}

// keys that were rotated again are those that would have been there
static double equals_without_rebase(llama_model * model, uint64_t & n_rebase) {
    const size_t n = 1500;

    context_params params;
    context rebased(model, params);
    params.pos_bound = 1 << 20;
    context straight(model, params);

    const double res = error_between(straight.read(text, 0, n, 13), rebased.read(text, 0, n, 13));

    require(straight.info().n_rebase == 0, "a stream with a large pos_bound was rebased");
    n_rebase = rebased.info().n_rebase;

    return res;
}

// if not, the rule is not in the graph
static double differs_without_sinks(llama_model * model) {
    const size_t n = 300;

    context_params with;
    with.n_local = 12; // few enough that the sinks weigh something

    context_params without = with;
    without.n_global = 0;

    context a(model, with);
    context b(model, without);
    a.read(text, 0, n, 30, 0, false);
    b.read(text, 0, n, 30, 0, false);

    return error_between(a.read(text, n, n + 100, 20), b.read(text, n, n + 100, 20));
}

// bit for bit: in the same context, and in another one under another sequence id
static double equals_restored(llama_model * model) {
    const size_t n = 1000;

    context_params params;
    context source(model, params);
    source.read(text, 0, n, 10, 0, false);
    const auto   state    = source.save();
    const logits expected = source.read(text, n, n + 100, 10);

    params.n_seq = 2;
    context target(model, params);
    target.read(other, 0, 300, 10, 0, false);
    target.restore(state, 1);
    require(target.read(text, n, n + 100, 10, 1) == expected, "restored into another context it goes on differently");

    source.restore(state);
    require(source.read(text, n, n + 100, 10) == expected, "restored into its own context it goes on differently");

    return 0.0;
}

static bool same_info(const lminf_info & a, const lminf_info & b) { return memcmp(&a, &b, sizeof(a)) == 0; }

// what is taken back was never read; what cannot be is refused, and nothing has changed
static double equals_rolled_back(llama_model * model, int32_t n_rs_seq, uint64_t & n_rollback) {
    const size_t n = 400; // more than there are cells

    context_params params;
    params.n_rs_seq = n_rs_seq;

    context untouched(model, params);
    untouched.read(text, 0, n, 20, 0, false);
    const lminf_info info = untouched.info();
    n_rollback = info.n_rollback;
    require(info.n_rollback >= 0 && info.n_rollback < info.stream_pos, "n_rollback makes no sense");

    {
        context refused(model, params);
        refused.read(text, 0, n, 20, 0, false);
        require(!lminf_rollback(refused.get(), 0, info.stream_pos - info.n_rollback - 1), "more than n_rollback tokens were taken back");
        require(same_info(refused.info(), info), "a rollback that was refused has changed something");
        require(refused.read(other, 0, 50, 10) == untouched.read(other, 0, 50, 10), "after a rollback that was refused it goes on differently");
    }

    double res = 0.0;
    for (const int32_t n_back : { std::min(info.n_rollback, 1), std::min(info.n_rollback, 5), info.n_rollback }) {
        if (n_back == 0) {
            continue;
        }
        context longer(model, params);
        longer.read(text, 0, n, 20, 0, false);
        require(lminf_rollback(longer.get(), 0, info.stream_pos - n_back), "a rollback within n_rollback was refused");
        require(longer.info().stream_pos == info.stream_pos - n_back, "a rollback ended at another position");

        context shorter(model, params);
        shorter.read(text, 0, n - n_back, 20, 0, false);

        res = std::max(res, error_between(shorter.read(other, 0, 100, 10), longer.read(other, 0, 100, 10)));
    }
    return res;
}

// sequences do not see each other
static double equals_alone(llama_model * model) {
    const size_t n = 350;

    context_params params;
    context a(model, params);
    context b(model, params);
    params.n_seq = 2;
    context both(model, params);

    logits alone;
    logits beside;
    const auto append = [](logits & to, const logits & from) { to.insert(to.end(), from.begin(), from.end()); };

    for (size_t i = 0; i < n; i += 7) {
        const tokens part_a(text.begin()  + i, text.begin()  + i + 7);
        const tokens part_b(other.begin() + i, other.begin() + i + 7 - i%3); // of another length now and then

        append(alone, a.decode({ { 0, part_a } })[0]);
        append(alone, b.decode({ { 0, part_b } })[0]);

        auto together = both.decode({ { 0, part_a }, { 1, part_b } });
        append(beside, together[0]);
        append(beside, together[1]);
    }
    return error_between(alone, beside);
}

static uint64_t context_bytes(const llama_context * ctx) {
    uint64_t res = 0;
    for (const auto & [_, size] : llama_get_memory_breakdown(ctx)) {
        res += size.context;
    }
    return res;
}

// bytes and positions stay where they are
static double keeps_memory(llama_model * model) {
    context_params params;
    params.n_batch  = 500;
    params.n_ubatch = 250;
    context ctx(model, params);

    const auto check = [&](const lminf_info & info) {
        require(info.max_graph_pos < info.pos_bound, "a graph position has passed the bound");
        require(context_bytes(ctx.get()) == info.kv_bytes, "kv_bytes are not what llama.cpp says it has allocated");
    };

    ctx.read(text, 0, 1000, 500, 0, false);
    const lminf_info before = ctx.info();
    check(before);

    const logits last  = ctx.read(text, 1000, 4000, 500, 0, false);
    const lminf_info after = ctx.info();
    check(after);

    require(after.stream_pos == 4000, "4,000 tokens were not counted as such");
    require(after.kv_bytes == before.kv_bytes, "memory has grown");
    require(std::all_of(last.begin(), last.end(), [](float x) { return std::isfinite(x); }), "logits are not finite");

    return 0.0;
}

struct not_applicable {}; // to this model

// attention reads the cells that one of the batch's sequences has filled, up to a multiple of 256, not the whole ring
static double reads_what_is_filled(llama_model * model) {
    const int64_t n_pad = 256;

    int64_t n_read = 0;

    context_params params;
    params.n_local = 1000;
    params.n_seq   = 2;
    params.on_node = [&](const ggml_tensor * node) {
        if (node->op == GGML_OP_LMINF_ATTN) {
            n_read = std::max(n_read, node->src[LMINF_ATTN_K]->ne[1]);
        }
    };
    context ctx(model, params);
    const int64_t n_cells = ctx.info().n_cells;

    const auto check = [&](int64_t n_filled, llama_seq_id seq_id, const tokens & part) {
        n_read = 0;
        ctx.decode({ { seq_id, part } });
        if (n_read == 0) {
            throw not_applicable(); // stock operations
        }
        const int64_t most = std::min(n_cells, (n_filled + n_pad - 1)/n_pad*n_pad);
        require(n_read <= most, std::to_string(n_read) + " cells were read where " + std::to_string(n_filled) + " are filled");
    };

    const tokens one = { text[0] };

    check(1, 0, one);
    ctx.read(text, 1, 300, 30, 0, false);
    check(301, 0, one);
    check(1,   1, one); // another sequence
    ctx.read(text, 301, 2500, 30, 0, false);
    check(n_cells, 0, one); // gone round
    check(2, 1, one);
    llama_memory_seq_rm(llama_get_memory(ctx.get()), 0, -1, -1);
    check(1, 0, one); // empty again
    return 0.0;
}

// both ways to compute the attention
static double equals_stock_operations(llama_model * model) {
    const size_t n = 400;

    context_params params;
    context chosen(model, params);
    params.attention = LMINF_ATTENTION_STOCK;
    context stock(model, params);

    return error_between(stock.read(text, 0, n, 30), chosen.read(text, 0, n, 30));
}

// token by token, a stream that recalls all that has left its window sees what one does that keeps all of it as sinks
static double recalls_as_sinks(llama_model * model) {
    const size_t n = 160;

    context_params kept;
    kept.n_local  = 40;
    kept.n_global = 200;

    context_params recalled;
    recalled.n_local  = 40;
    recalled.n_recall = 256;

    return error_between(context(model, kept).read(text, 0, n, 1), context(model, recalled).read(text, 0, n, 1));
}

// the same model on the CPU, over a text of several windows
static double equals_cpu(const arch_model & what, llama_model * model) {
    const size_t n = 400;

    context_params params;
    const llama_model_ptr other = make_model(what);

    return error_between(context(other.get(), params).read(text, 0, n, 30), context(model, params).read(text, 0, n, 30));
}

// A quantized cache, in units of what quantizing changes with llama.cpp's own: it rotates queries, keys and values so that
// they quantize better, and an attention that reads them must know.
static double quantization_error(llama_model * model) {
    const size_t n = 300;

    context_params stock;
    stock.n_local = 0;
    const logits exact = context(model, stock).read(text, 0, n, 30);

    stock.type  = GGML_TYPE_Q8_0;
    stock.flash = true;

    context_params lambda = stock;
    lambda.n_local = 320;

    if (model->arch == LLM_ARCH_PLM) {
        throw not_applicable(); // llama.cpp's own graph aborts with flash attention
    }
    if (model->arch == LLM_ARCH_MINIMAX_M3) {
        throw not_applicable(); // with flash attention it selects, and its values cannot be quantized here
    }

    logits expected;
    try {
        expected = context(model, stock).read(text, 0, n, 30);
    } catch (const std::exception &) {
        throw not_applicable();
    }
    const logits actual   = context(model, lambda).read(text, 0, n, 30);

    return error_between(expected, actual)/error_between(exact, expected);
}

// what a stream cannot read is refused, and nothing has changed
static double refuses_bad_batches(llama_model * model) {
    const size_t n = 60;

    context_params params;
    context ctx(model, params);
    context untouched(model, params);
    ctx.read(text, 0, n, 20, 0, false);
    untouched.read(text, 0, n, 20, 0, false);
    const lminf_info info = ctx.info();

    std::vector<float> embeddings(4*llama_model_n_embd_inp(model));
    std::vector<llama_pos> pos(4*4);

    llama_batch images = llama_batch_get_one(nullptr, 4); // as a projector hands them over, with positions in two dimensions
    images.embd = embeddings.data();
    images.pos  = pos.data();
    for (size_t i = 0; i < pos.size(); ++i) {
        pos[i] = n + i%2;
    }
    require(llama_decode(ctx.get(), images) != 0, "a batch of embeddings with positions of its own was read");

    llama_set_causal_attn(ctx.get(), false);
    tokens few(text.begin(), text.begin() + 4);
    require(llama_decode(ctx.get(), llama_batch_get_one(few.data(), 4)) != 0, "a batch was read without a causal mask");
    llama_set_causal_attn(ctx.get(), true);

    require(same_info(ctx.info(), info), "a batch that was refused has changed something");
    require(ctx.read(text, n, n + 100, 20) == untouched.read(text, n, n + 100, 20), "after a batch that was refused it goes on differently");

    return 0.0;
}

// a recurrent state alone, while the window can still be truncated to where it was saved
static double equals_restored_partly(llama_model * model) {
    const size_t n = 400;

    context_params params;
    context ctx(model, params);
    ctx.read(text, 0, n, 20, 0, false);
    const auto partial = ctx.save(0, LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY);
    const auto whole   = ctx.save(0);
    require(partial.size() < whole.size(), "the partial state is no smaller than the whole one");

    const int64_t stream_pos = ctx.info().stream_pos;
    ctx.read(other, 0, 40, 10, 0, false);
    ctx.restore(partial, 0, LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY);
    require(lminf_rollback(ctx.get(), 0, stream_pos), "the window cannot be truncated to a restored recurrent state");
    const logits actual = ctx.read(text, n, n + 100, 10);

    context from_whole(model, params);
    from_whole.restore(whole);
    const double res = error_between(from_whole.read(text, n, n + 100, 10), actual);

    ctx.read(other, 0, 300, 20, 0, false);
    const bool is_restored = llama_state_seq_set_data_ext(ctx.get(), partial.data(), partial.size(), 0, LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) > 0;
    require(!is_restored || !lminf_rollback(ctx.get(), 0, stream_pos), "the window was truncated to what it no longer holds");

    return res;
}

//
// one model
//

static std::string traits(const llama_hparams & hparams) {
    std::vector<const char *> names;
    if (hparams.n_pos_per_embd() > 1) {
        names.push_back("M-RoPE");
    }
    if (hparams.is_mla()) {
        names.push_back("MLA");
    }
    if (hparams.f_attn_temp_scale != 0.0f && hparams.n_attn_temp_floor_scale > 0) {
        names.push_back("temperature");
    }
    if (hparams.swa_type == LLAMA_SWA_TYPE_CHUNKED) {
        names.push_back("chunks");
    }
    if (hparams.use_alibi) {
        names.push_back("ALiBi");
    }
    if (hparams.router_layer >= 0) {
        names.push_back("adapters");
    }
    if (hparams.indexer_top_k > 0) {
        names.push_back("selection");
    }

    std::string res;
    for (const char * name : names) {
        res += (res.empty() ? "" : ", ") + quoted(name);
    }
    return "[" + res + "]";
}

static void add_sizes(const arch_model & what, llama_model * model, json_object & res) {
    context_params params;
    params.type = GGML_TYPE_F16;
    const context ctx(model, params);

    lminf_parts parts = {};
    require(lminf_get_parts(ctx.get(), &parts), "lminf_get_parts failed");

    json_object layers;
    layers.add("full",      number((uint64_t) parts.n_layer_full));
    layers.add("sliding",   number((uint64_t) parts.n_layer_sliding));
    layers.add("recurrent", number((uint64_t) parts.n_layer_recurrent));
    layers.add("fused",     number((uint64_t) parts.n_layer_fused));
    res.add("layers", layers.str());

    params.n_local = 0;
    params.n_ctx   = 10000;

    json_object bytes;
    bytes.add("window",    number(parts.window_bytes));
    bytes.add("sinks",     number(parts.sink_bytes));
    bytes.add("sliding",   number(parts.sliding_bytes));
    bytes.add("recurrent", number(parts.recurrent_bytes));
    bytes.add("stock",     number(context_bytes(context(model, params).get())));
    res.add("bytes", bytes.str());

    require(parts.window_bytes + parts.sink_bytes + parts.sliding_bytes + parts.recurrent_bytes == ctx.info().kv_bytes,
            "the parts' bytes are not kv_bytes");

    params.n_local = context_params().n_local;

    const llama_model_ptr empty = make_model(what, /*has_weights =*/ false, device);
    const context         planned(empty.get(), params);

    lminf_parts before = {};
    require(lminf_get_parts(planned.get(), &before), "lminf_get_parts failed for a model without weights");
    require(memcmp(&before, &parts, sizeof(parts)) == 0, "a model without weights has other parts");
    require(planned.info().kv_bytes == ctx.info().kv_bytes, "a model without weights has other kv_bytes");
}

static void check_all(const arch_model & what, llama_model * model, json_object & res) {
    json_object checks;
    json_object faults;

    const auto check = [&](const char * name, const std::function<double()> & run) {
        try {
            checks.add(name, number(run()));
        } catch (const not_applicable &) {
            checks.add(name, "null");
        } catch (const std::exception & err) {
            faults.add(name, quoted(err.what()));
        }
    };

    uint64_t n_rebase    = 0;
    uint64_t n_rollback  = 0;
    uint64_t n_snapshots = 0;

    check("stock",      [&] { return equals_stock(model); });
    check("rebase",     [&] { return equals_without_rebase(model, n_rebase); });
    check("sinks",      [&] { return differs_without_sinks(model); });
    check("state",      [&] { return equals_restored(model); });
    check("rollback",   [&] { return equals_rolled_back(model, 0, n_rollback); });
    check("sequences",  [&] { return equals_alone(model); });
    check("memory",     [&] { return keeps_memory(model); });
    check("filled",     [&] { return reads_what_is_filled(model); });
    check("operations", [&] { return equals_stock_operations(model); });
    check("recall",     [&] { return recalls_as_sinks(model); });
    check("batches",    [&] { return refuses_bad_batches(model); });
    check("quantized",  [&] { return quantization_error(model); });
    if (llama_model_is_hybrid(model)) {
        check("partial", [&] { return equals_restored_partly(model); });
        check("snapshots", [&] { return equals_rolled_back(model, 8, n_snapshots); });
    }
    if (device) {
        check("cpu", [&] { return equals_cpu(what, model); });
    }
    check("sizes", [&] { add_sizes(what, model, res); return 0.0; });

    res.add("rebases",   number(n_rebase));
    res.add("rollback",  number(n_rollback));
    res.add("snapshots", number(n_snapshots));
    res.add("checks",    checks.str());
    res.add("faults",    faults.str());
}

static std::string refusal(llama_model * model) {
    if (const char * why = lminf_refusal(model)) {
        return why;
    }
    try {
        context(model, {}); // some are only found out when their graph is built
    } catch (const std::exception & err) {
        return err.what();
    }
    return "";
}

static int test_model(const arch_model & what) {
    json_object res;
    res.add("name", quoted(what.name()));

    const llama_model_ptr model = make_model(what, /*has_weights =*/ true, device);
    res.add("traits", traits(model->hparams));

    if (lminf_support(model.get()) == LMINF_SUPPORT_CONSTANT) {
        res.add("verdict", quoted("constant"));
        res.add("sequences", number(equals_alone(model.get())));
    } else if (const std::string why = refusal(model.get()); !why.empty()) {
        res.add("verdict", quoted("refused"));
        res.add("why",     quoted(why));
    } else {
        res.add("verdict", quoted("runs"));
        check_all(what, model.get(), res);
    }

    printf("%s\n", res.str().c_str());
    return 0;
}

static const arch_model & find_model(const std::vector<arch_model> & models, const std::string & name) {
    const auto it = std::find_if(models.begin(), models.end(), [&](const arch_model & model) { return model.name() == name; });
    if (it == models.end()) {
        throw std::runtime_error("there is no model " + name + ": --list names them");
    }
    return *it;
}

int main(int argc, char ** argv) {
    std::vector<std::string> args(argv + 1, argv + argc);

    llama_log_set([](ggml_log_level level, const char * line, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) {
            fputs(line, stderr);
        }
    }, nullptr);

    if (args.size() >= 2 && args[0] == "--device") {
        device = ggml_backend_dev_by_name(args[1].c_str());
        if (!device) {
            fprintf(stderr, "error: there is no device %s\n", args[1].c_str());
            return 1;
        }
        args.erase(args.begin(), args.begin() + 2);
    }

    try {
        const auto models = all_arch_models();

        if (args.size() == 1 && args[0] == "--list") {
            for (const arch_model & model : models) {
                printf("%s\n", model.name().c_str());
            }
            return 0;
        }
        if (args.size() >= 2 && args.size() <= 4 && args[0] == "--random") {
            const llama_model_ptr model = make_model(find_model(models, args[1]), /*has_weights =*/ true, device);
            return test_random(model.get(), args.size() > 2 ? std::stoi(args[2]) : 10, args.size() > 3 ? std::stoul(args[3]) : 1);
        }
        if (args.size() == 1) {
            return test_model(find_model(models, args[0]));
        }
    } catch (const std::exception & err) {
        fprintf(stderr, "error: %s\n", err.what());
        return 1;
    }

    fprintf(stderr, "usage: %s [--device DEVICE] --list | NAME | --random NAME [ROUNDS [SEED]]\n", argv[0]);
    return 2;
}
