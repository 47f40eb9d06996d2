#include "random.h"

#include "context.h"
#include "generator.h"

#include <functional>
#include <random>

namespace {

// what a sequence should have come to: a fresh run of this gives the same logits
struct history {
    int64_t start    = 0;  // stream position of the first token
    int32_t n_global = -1; // sinks kept; -1: as the context says
    tokens  text;

    size_t  n_before_skip = 0; // tokens before the skip, if there was one
    int64_t n_skipped     = 0;

    int64_t stream_pos() const { return start + (int64_t) text.size() + n_skipped; }
    bool    is_empty()   const { return text.empty() && n_skipped == 0; }
};

const int32_t n_seq    = 3;
const int32_t n_global = 4;
const int32_t n_local  = 24;
const int32_t n_window = 96; // the longest that any layer has

class run {
public:
    run(llama_model * model, int32_t n_rs_seq, uint32_t seed) : model(model), gen(seed), params(make_params(n_rs_seq)), ctx(model, params), seqs(n_seq) {}

    void play(int n_ops) {
        try {
            for (int i = 0; i < n_ops; ++i) {
                step();
                check_positions();
            }
            for (llama_seq_id s = 0; s < n_seq; ++s) {
                verify(s, decode({ { s, random_text(5) } })[s], 5);
            }
        } catch (const std::exception & err) {
            throw std::runtime_error(std::string(err.what()) + " after" + trace);
        }
    }

    double  error   = 0.0;
    int32_t n_ops   = 0;
    int32_t n_taken = 0; // rollbacks that took tokens back

private:
    static context_params make_params(int32_t n_rs_seq) {
        context_params res;
        res.n_local  = n_local;
        res.n_global = n_global;
        res.n_seq    = n_seq;
        res.n_rs_seq = n_rs_seq;
        res.n_ubatch = 8*n_seq; // llama.cpp's graphs of Kimi Linear cannot be made for a part of a token per sequence
        return res;
    }

    int pick(int n) { return std::uniform_int_distribution<int>(0, n - 1)(gen); }

    tokens random_text(size_t n) {
        tokens res;
        for (size_t i = 0; i < n; ++i) {
            res.push_back(pick(128));
        }
        return res;
    }

    void note(const std::string & op) {
        n_ops++;
        trace += " " + op;
        if (trace.size() > 600) {
            trace.erase(0, trace.find(' ', trace.size() - 600));
        }
    }

    void require(bool condition, const std::string & what) {
        if (!condition) {
            throw std::runtime_error(what);
        }
    }

    void step() {
        const llama_seq_id s = pick(n_seq);
        const llama_seq_id t = pick(n_seq);
        llama_memory_t     mem = llama_get_memory(ctx.get());
        history          & seq = seqs[s];

        const std::string id = std::to_string(s);

        switch (pick(32)) {
            case 0: {
                note("keep(" + id + ")");
                llama_memory_seq_keep(mem, s);
                for (llama_seq_id i = 0; i < n_seq; ++i) {
                    seqs[i] = i == s ? seqs[i] : history();
                }
            } break;
            case 1: {
                const bool data = pick(2) == 1;
                note(data ? "clear(data)" : "clear()");
                llama_memory_clear(mem, data);
                seqs.assign(n_seq, history());
            } break;
            case 2: {
                note("rm(" + id + ")");
                require(llama_memory_seq_rm(mem, s, -1, -1), "a whole sequence could not be removed");
                seq = history();
            } break;
            case 3:
            case 4: {
                note("cp(" + id + "," + std::to_string(t) + ")");
                llama_memory_seq_cp(mem, s, t, -1, -1);
                seqs[t] = seqs[s];
            } break;
            case 5:
            case 6: {
                if (!seq.is_empty()) {
                    note("save(" + id + ")");
                    saved.push_back({ seq, ctx.save(s) });
                }
            } break;
            case 7:
            case 8: {
                if (!saved.empty()) {
                    const auto & [then, state] = saved[pick(saved.size())];
                    note("restore(" + id + "," + std::to_string(then.stream_pos()) + ")");
                    ctx.restore(state, s);
                    seq = then;
                }
            } break;
            case 9: {
                const int32_t n = pick(n_global + 2);
                note("sinks(" + id + "," + std::to_string(n) + ")");
                const bool done = lminf_seq_set_sinks(ctx.get(), s, n);
                require(done == (seq.is_empty() && n <= n_global), "set_sinks said yes or no where it should not");
                seq.n_global = done ? n : seq.n_global;
            } break;
            case 10: {
                const int64_t pos = pick(2) ? pick(1000) : ((int64_t) 1 << 33) + pick(1000);
                note("start(" + id + "," + std::to_string(pos) + ")");
                const bool done = lminf_seq_start(ctx.get(), s, pos);
                require(done == seq.is_empty(), "seq_start said yes or no where it should not");
                seq.start = done ? pos : seq.start;
            } break;
            case 11: {
                const int64_t n = n_window + pick(500);
                if (seq.n_skipped > 0) {
                    break; // one is enough for a fresh run
                }
                note("skip(" + id + "," + std::to_string(n) + ")");
                const bool has_sinks = (int64_t) seq.text.size() >= sinks_of(seq);
                const bool done      = lminf_skip(ctx.get(), s, n);
                require(done == has_sinks, "skip said yes or no where it should not");
                if (done) {
                    seq.n_before_skip = seq.text.size();
                    seq.n_skipped     = n;
                }
            } break;
            case 12:
            case 13:
            case 14:
            case 15:
            case 16:
            case 17: {
                roll_back(s);
            } break;
            default: {
                std::map<llama_seq_id, tokens> parts;
                parts[s] = random_text(1 + pick(pick(3) ? 8 : 30));
                if (t != s && pick(2)) {
                    parts[t] = random_text(1 + pick(20));
                }
                for (const auto & [i, part] : parts) {
                    note("read(" + std::to_string(i) + "," + std::to_string(part.size()) + ")");
                }
                auto out = decode(parts);
                if (pick(5) == 0) {
                    for (const auto & [i, part] : parts) {
                        verify(i, out[i], part.size());
                    }
                }
                if (pick(6) == 0) { // long enough that cells are used again, and positions moved back
                    note("read(" + id + ",240)");
                    for (int i = 0; i < 6; ++i) {
                        decode({ { s, random_text(40) } });
                    }
                }
            } break;
        }
    }

    int32_t sinks_of(const history & seq) const { return seq.n_global < 0 ? n_global : seq.n_global; }

    void roll_back(llama_seq_id s) {
        history & seq = seqs[s];
        if (seq.is_empty()) {
            return; // to empty it once more takes its settings back
        }
        const lminf_info info = ctx.info(s);
        const int64_t n_after = seq.text.size() - seq.n_before_skip; // what a rollback can reach without removing all

        const int64_t n = pick(2) ? pick(info.n_rollback + 1) : info.n_rollback + 1 + pick(3);
        note("back(" + std::to_string(s) + "," + std::to_string(n) + "/" + std::to_string(info.n_rollback) + ")");
        require(info.n_rollback <= n_after, "n_rollback is more than was read");

        if (n > info.n_rollback) {
            if (info.stream_pos - n <= seq.start) {
                return; // removes the sequence, which is always possible
            }
            require(!lminf_rollback(ctx.get(), s, info.stream_pos - n), "more than n_rollback tokens were taken back");
            return;
        }
        if (n == n_after && n > 0 && seq.n_skipped == 0) {
            return; // the same
        }

        // in graph positions as often as in those of the stream
        const llama_pos next = llama_memory_seq_pos_max(llama_get_memory(ctx.get()), s) + 1;
        const bool      done = pick(2) ? lminf_rollback(ctx.get(), s, info.stream_pos - n)
                                       : llama_memory_seq_rm(llama_get_memory(ctx.get()), s, next - n, -1);
        require(done, "a rollback within n_rollback was refused");
        seq.text.resize(seq.text.size() - n);
        n_taken += n > 0;
    }

    std::map<llama_seq_id, logits> decode(const std::map<llama_seq_id, tokens> & parts) {
        for (const auto & [s, part] : parts) {
            seqs[s].text.insert(seqs[s].text.end(), part.begin(), part.end());
        }
        return ctx.decode(parts);
    }

    void check_positions() {
        for (llama_seq_id s = 0; s < n_seq; ++s) {
            const lminf_info info = ctx.info(s);
            require(info.stream_pos == seqs[s].stream_pos(), "sequence " + std::to_string(s) + " is at another stream position");
            require(info.max_graph_pos < info.pos_bound, "a graph position has passed the bound");

            const int64_t n_read = seqs[s].n_skipped > 0 ? seqs[s].n_before_skip : seqs[s].text.size();
            require(info.n_sink == std::min<int64_t>(n_read, sinks_of(seqs[s])), "sequence " + std::to_string(s) + " has another number of sinks");
        }
    }

    // the logits of the last n tokens of a sequence, in a context that has seen nothing else
    void verify(llama_seq_id s, const logits & actual, size_t n) {
        const history & seq = seqs[s];

        context_params alone = params;
        alone.n_seq    = 1;
        alone.n_rs_seq = 0;
        context fresh(model, alone);

        lminf_seq_start(fresh.get(), 0, seq.start);
        lminf_seq_set_sinks(fresh.get(), 0, sinks_of(seq));

        const size_t n_before = seq.text.size() - n;
        if (seq.n_skipped > 0) {
            fresh.read(seq.text, 0, seq.n_before_skip, 37, 0, false);
            require(lminf_skip(fresh.get(), 0, seq.n_skipped), "a fresh run cannot skip");
        }
        fresh.read(seq.text, seq.n_skipped > 0 ? seq.n_before_skip : 0, n_before, 37, 0, false);

        const double now = error_between(fresh.read(seq.text, n_before, seq.text.size(), 64), actual);
        if (!(now <= error)) {
            error = now;
        }
        if (!(now < 1e-6)) {
            char figure[64];
            snprintf(figure, sizeof(figure), " (error %.1e)", now);
            throw std::runtime_error("sequence " + std::to_string(s) + " is not what a fresh run gives" + figure);
        }
    }

    llama_model * model;

    std::mt19937   gen;
    context_params params;
    context        ctx;

    std::vector<history> seqs;
    std::vector<std::pair<history, std::vector<uint8_t>>> saved;

    std::string trace;
};

} // namespace

int test_random(llama_model * model, int n_rounds, uint32_t seed) {
    double  error   = 0.0;
    int32_t n_ops   = 0;
    int32_t n_taken = 0;

    for (int round = 0; round < n_rounds; ++round) {
        try {
            // recurrent models keep snapshots in every second round
            run round_run(model, round % 2 && llama_model_is_hybrid(model) ? 8 : 0, seed + round);
            round_run.play(50);

            error    = std::max(error, round_run.error);
            n_ops   += round_run.n_ops;
            n_taken += round_run.n_taken;
        } catch (const std::exception & err) {
            fprintf(stderr, "error: seed %u: %s\n", seed + round, err.what());
            return 1;
        }
    }

    printf("{\"rounds\": %d, \"seed\": %u, \"operations\": %d, \"rollbacks\": %d, \"error\": %.3g}\n", n_rounds, seed, n_ops, n_taken, error);
    return 0;
}
