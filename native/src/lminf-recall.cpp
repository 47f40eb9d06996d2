#include "lminf-recall.h"
#include "lminf-rows.h"

#include "ggml.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <mutex>
#include <set>

constexpr int64_t n_segment = lminf_archive_layout::n_segment;

//
// lminf_recall
//

lminf_recall::lminf_recall(const lminf_cparams & params, std::shared_ptr<const lminf_archive_layout> layout_, uint32_t n_seq_max) :
    params(params), layout(std::move(layout_)), archives(n_seq_max, lminf_archive(layout, params.n_archive)), choices(n_seq_max),
    n_recalls(n_seq_max, params.n_recall) {}

void lminf_recall::copy(llama_seq_id seq_id_src, llama_seq_id seq_id_dst) {
    archives[seq_id_dst] = archives[seq_id_src];
    choices [seq_id_dst] = choices [seq_id_src];
}

//
// one layer
//

namespace {

// tokens that are scored at one go
constexpr int64_t n_tile = 128;

// of all candidates, at most
constexpr int64_t n_sample = 256;

// rows of any type that a cache has
void convert_row(ggml_type type, const void * src, int64_t n, ggml_type dst_type, void * dst) {
    if (type == dst_type) {
        memcpy(dst, src, ggml_row_size(type, n));
    } else if (type == GGML_TYPE_BF16) { // then dst is F32
        ggml_bf16_to_fp32_row((const ggml_bf16_t *) src, (float *) dst, n);
    } else {
        lminf_row_load(type, src, n, dst_type, dst);
    }
}

}

// tokens whose keys are read, and how much the queries that vote look for them
struct lminf_recall_scores {
    std::vector<int64_t> tokens;

    // [n_head*n_votes][n] of each n_tile of them, one after the other, as exp(score - max); empty if they would be too many to keep
    std::vector<float> scores;

    // [tiles][n_head*n_votes]
    std::vector<float> max;
    std::vector<float> sum;

    int64_t n_tiles() const { return ((int64_t) tokens.size() + n_tile - 1)/n_tile; }

    int64_t tile_size(int64_t tile) const { return std::min(n_tile, (int64_t) tokens.size() - tile*n_tile); }
};

// what is found on the way to one stream's choice in one layer, between its phases
struct lminf_recall_work {
    std::vector<float> q; // [n_head][n_queries][n_embd_head_k], the queries that vote, scaled

    lminf_recall_scores sample; // where there are sketches, of all candidates; in the end of those that are not on the list
    lminf_recall_scores list;

    float n_each = 0.0f; // tokens that each one of the sample stands for

    // what the threads found that have finished a phase; with the paper's rule, of each head
    std::vector<lminf_best> best;
    std::mutex              mutex;
    int                     n_finished = 0;

    std::vector<float> log_totals; // [n_head*n_votes], of all candidates' exp(score)

    std::vector<float> votes;  // for each of the list
    std::vector<float> spread; // and for those around it

    // Every 2^k-th token: the same ones again for the next query, as long as it can be
    void take_sample(const lminf_recall_seq & seq) {
        int64_t step = 1;
        while (step*n_sample < seq.n_candidates) {
            step *= 2;
        }
        sample.tokens.clear();
        for (const auto & [first, second] : seq.candidates) {
            for (int64_t i = (first + step - 1)/step*step; i < second && (int64_t) sample.tokens.size() < n_sample; i += step) {
                sample.tokens.push_back(i);
            }
        }
    }
};

enum phase { SAMPLE, SCAN, SCORE, VOTE, GATHER, CONFIDENCE, N_PHASES };

struct lminf_recall_layer {
    struct node {
        lminf_recall_layer * layer;
        enum phase           phase;
    };

    lminf_recall_batch & batch;

    const lminf_archive_layout::layer & l;

    const size_t id; // among those of the layout
    const size_t il;

    std::array<node, N_PHASES> nodes;

    ggml_tensor * chosen = nullptr; // what the last node before GATHER made: no contents

    int64_t n_head        = 0;
    float   scale         = 1.0f;
    float   logit_softcap = 0.0f;
    int64_t n_rows        = 0;

    lminf_recall_layer(lminf_recall_batch & batch, const lminf_archive_layout::layer & l, int il) :
        batch(batch), l(l), id(batch.recall.layout->index_of(l)), il(il) {
        for (int i = 0; i < N_PHASES; ++i) {
            nodes[i] = { this, (enum phase) i };
        }
    }

    bool is_paper() const { return batch.recall.params.recall_rule == LMINF_RECALL_PAPER; }

    int64_t n_queries(const lminf_recall_seq & seq) const { return is_paper() ? 1 : std::min(seq.n_tokens, lminf_recall::n_votes); }

    // rows that are no zeros
    int64_t n_filled(const lminf_recall_seq & seq) const { return is_paper() ? seq.n_chosen*(n_head/l.n_head_kv) : seq.n_chosen; }

    // of all heads
    int64_t n_scores(const lminf_recall_seq & seq) const { return n_head*n_queries(seq); }

    lminf_recall_choice & choice(int64_t stream) const { return batch.recall.choices[batch.seq_ids[stream]]; }

    //
    // storing
    //

    void learn(const lminf_archive & archive, int64_t h, lminf_axes & axes) const {
        const auto [i0, i1] = archive.get_learned();

        std::vector<float> k((i1 - i0)*l.n_embd_head_k);
        for (int64_t i = i0; i < i1; ++i) {
            load_key(archive.get_segment(i), i, h, GGML_TYPE_F32, k.data() + (i - i0)*l.n_embd_head_k);
        }
        axes = lminf_find_axes(k.data(), i1 - i0, l.n_embd_head_k);
    }

    void load_key(const char * segment, int64_t i, int64_t h, ggml_type dst_type, void * dst) const {
        lminf_row_load(l.type_k, segment + l.at_k + i % n_segment*l.size_k + h*ggml_row_size(l.type_k, l.n_embd_head_k), l.n_embd_head_k, dst_type, dst);
    }

    void load_value(const char * segment, int64_t i, int64_t h, ggml_type dst_type, void * dst) const {
        const int64_t n_v = l.n_embd_v_gqa/l.n_head_kv;

        lminf_row_load(l.type_v, segment + l.at_v + i % n_segment*l.size_v + h*ggml_row_size(l.type_v, n_v), n_v, dst_type, dst);
    }

    void sketch(lminf_archive & archive, int64_t i, int64_t h, const lminf_axes & axes, const float * k) const {
        float x[lminf_n_dirs];
        lminf_project(axes, k, x);

        const int64_t row = i % n_segment;
        lminf_sketch_store(archive.get_segment(i) + l.at_sketch + (h*n_segment + row)/lminf_n_lanes*lminf_sketch_size(), row % lminf_n_lanes, x);
    }

    void store(const ggml_tensor * k, const ggml_tensor * v, int ith, int nth) const {
        for (int64_t s = 0; s < (int64_t) batch.seqs.size(); ++s) {
            const auto & seq = batch.seqs[s];

            auto & archive = *seq.archive;

            const auto data = [&](const ggml_tensor * t, int64_t i, int64_t h) {
                return (const float *) ((const char *) t->data + (s*seq.n_tokens + i)*t->nb[2] + h*t->nb[1]);
            };
            // what there was no memory for
            const auto stored = archive.find(seq.index, seq.index + seq.n_tokens);
            const int64_t i1 = stored.empty() ? 0 : stored.back().second - seq.index;

            for (int64_t i = stored.empty() ? 0 : stored.front().first - seq.index; i < i1; ++i) {
                if (i % nth != ith) {
                    continue;
                }
                char * segment = archive.get_segment(seq.index + i);
                char * dst_k   = segment + l.at_k + (seq.index + i) % n_segment*l.size_k;
                char * dst_v   = segment + l.at_v + (seq.index + i) % n_segment*l.size_v;

                for (int64_t h = 0; h < l.n_head_kv; ++h) {
                    lminf_row_store(l.type_k, data(k, i, h), l.n_embd_head_k, dst_k + h*ggml_row_size(l.type_k, l.n_embd_head_k));
                    if (v && l.n_embd_v_gqa > 0) {
                        lminf_row_store(l.type_v, data(v, i, h), v->ne[0], dst_v + h*ggml_row_size(l.type_v, v->ne[0]));
                    }
                }
            }

            auto * axes = archive.get_axes(id);
            if (!axes) {
                continue;
            }
            for (int64_t h = ith; h < l.n_head_kv; h += nth) {
                if ((*axes)[h].n_embd == 0) {
                    learn(archive, h, (*axes)[h]);

                    std::vector<float> key(l.n_embd_head_k);
                    for (const auto & [first, second] : archive.find(archive.get_learned().first, seq.index)) {
                        for (int64_t i = first; i < second; ++i) {
                            load_key(archive.get_segment(i), i, h, GGML_TYPE_F32, key.data());
                            sketch(archive, i, h, (*axes)[h], key.data());
                        }
                    }
                }
                for (int64_t i = stored.empty() ? 0 : stored.front().first - seq.index; i < i1; ++i) {
                    sketch(archive, seq.index + i, h, (*axes)[h], data(k, i, h));
                }
            }
        }
    }

    //
    // choosing
    //

    bool has_sketches(const lminf_recall_seq & seq) const {
        return !is_paper() && batch.recall.params.recall_index == LMINF_RECALL_SKETCH && seq.archive->get_axes(id) &&
            seq.n_candidates > std::max(lminf_recall::n_all, n_short(seq));
    }

    // a list that serves many queries is longer
    int64_t n_short(const lminf_recall_seq & seq) const {
        return std::max<int64_t>(n_queries(seq) == 1 ? 1024 : 4096, 4*n_rows);
    }

    // What a thread found joins what the others did, and the last one goes on. That spares a node of its own, which all would wait for
    template <typename F>
    void finish(lminf_recall_work & w, std::vector<lminf_best> found, int nth, F go_on) const {
        std::lock_guard<std::mutex> lock(w.mutex);

        if (w.n_finished == 0) {
            w.best = std::move(found);
        } else {
            for (size_t i = 0; i < w.best.size(); ++i) {
                w.best[i].add(found[i]);
            }
        }
        if (++w.n_finished == nth) {
            w.n_finished = 0;
            go_on();
        }
    }

    // the i-th query that votes, of head h
    const float * get_query(const lminf_recall_seq & seq, const ggml_tensor * q, int64_t s, int64_t h, int64_t i) const {
        return (const float *) ((const char *) q->data + ((s + 1)*seq.n_tokens - n_queries(seq) + i)*q->nb[2] + h*q->nb[1]);
    }

    // scaled
    void load_queries(const lminf_recall_seq & seq, const ggml_tensor * q, int64_t s, float * dst) const {
        for (int64_t i = 0; i < n_scores(seq); ++i) {
            const float * src = get_query(seq, q, s, i/n_queries(seq), i % n_queries(seq));
            dst = std::transform(src, src + l.n_embd_head_k, dst, [&](float x) { return scale*x; });
        }
    }

    // of exp(score), over all scores of a query
    struct total {
        float  max;
        double sum; // of exp(score - max)
    };

    static void add(total & t, float max, double sum) {
        if (max <= t.max) {
            t.sum += sum*exp(max - t.max);
        } else {
            t = { max, t.sum*exp(t.max - max) + sum };
        }
    }

    // the i-th of n_scores
    total add_up(const lminf_recall_seq & seq, const lminf_recall_scores & x, int64_t i) const {
        total res = { x.max[i], x.sum[i] };
        for (int64_t tile = 1; tile < x.n_tiles(); ++tile) {
            add(res, x.max[tile*n_scores(seq) + i], x.sum[tile*n_scores(seq) + i]);
        }
        return res;
    }

    void scan(const lminf_recall_seq & seq, const lminf_recall_work & w, lminf_best & found, int ith, int nth) const {
        const auto & axes = *seq.archive->get_axes(id);

        const int64_t n_q = n_queries(seq)*(n_head/l.n_head_kv);

        std::vector<float> y(l.n_head_kv*n_q*lminf_n_dirs);
        std::vector<float> offset;
        for (int64_t i = 0; i < l.n_head_kv*n_q; ++i) {
            const float mean = lminf_project_query(axes[i/n_q], w.q.data() + i*l.n_embd_head_k, &y[i*lminf_n_dirs]);

            // so that queries of any temperature can be compared: what its votes are divided by, as far as the sample tells
            const auto t = add_up(seq, w.sample, i);
            offset.push_back(mean - t.max - (float) log(t.sum));
        }
        std::vector<lminf_sketch_queries> queries;
        for (int64_t h = 0; h < l.n_head_kv; ++h) {
            queries.emplace_back(&y[h*n_q*lminf_n_dirs], &offset[h*n_q], n_q);
        }

        // Whole segments: the sketches of all heads lie there one after the other, as memory is fetched best; this thread's, four
        // at a time
        struct piece { int64_t i0, first, second; };

        std::vector<piece> pieces;

        int64_t i_piece = 0;
        for (const auto & [first_candidate, second] : seq.candidates) {
            const int64_t first = std::max(first_candidate, seq.archive->get_learned().first);

            for (int64_t i0 = first/n_segment*n_segment; i0 < second; i0 += n_segment) {
                if (i_piece++ % nth == ith) {
                    pieces.push_back({ i0, std::max(first, i0), std::min(second, i0 + n_segment) });
                }
            }
        }

        constexpr size_t n_at_once = 4;

        std::vector<float> best(n_at_once*n_segment);

        for (size_t i = 0; i < pieces.size(); i += n_at_once) {
            const size_t n = std::min(n_at_once, pieces.size() - i);

            std::fill(best.begin(), best.end(), -INFINITY);
            for (int64_t h = 0; h < l.n_head_kv; ++h) {
                const char * parts[n_at_once];
                for (size_t k = 0; k < n; ++k) {
                    parts[k] = seq.archive->get_segment(pieces[i + k].i0) + l.at_sketch + h*n_segment/lminf_n_lanes*lminf_sketch_size();
                }
                lminf_sketch_max(parts, n, n_segment/lminf_n_lanes, queries[h], best.data());
            }
            for (size_t k = 0; k < n; ++k) {
                const auto & [i0, first, second] = pieces[i + k];
                found.add(&best[k*n_segment + first - i0], second - first, first - seq.candidates.front().first);
            }
        }
    }

    // The tokens with the best sketches, in order, and the neighbors of the best of them: a hit is found by the votes around it
    static void add_short(const lminf_recall_seq & seq, std::vector<lminf_best::entry> best, std::vector<int64_t> & tokens) {
        const int64_t first = seq.candidates.front().first;
        for (const auto & [i, _] : best) {
            tokens.push_back(first + i);
        }
        const auto n_before = tokens.size();

        const auto end = best.begin() + best.size()/16;
        std::nth_element(best.begin(), end, best.end(), [](const auto & a, const auto & b) {
            return a.second != b.second ? a.second > b.second : a.first < b.first;
        });
        std::sort(best.begin(), end);

        int64_t next = 0;
        for (auto it = best.begin(); it != end; ++it) {
            const int64_t i = first + it->first;
            for (next = std::max(next, i - lminf_recall::n_near + 1); next < i + lminf_recall::n_near; ++next) {
                if (is_candidate(seq, next)) {
                    tokens.push_back(next);
                }
            }
        }
        std::inplace_merge(tokens.begin(), tokens.begin() + n_before, tokens.end());
        tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
    }

    static bool is_candidate(const lminf_recall_seq & seq, int64_t i) {
        return std::any_of(seq.candidates.begin(), seq.candidates.end(), [&](const auto & range) { return range.first <= i && i < range.second; });
    }

    void list(const lminf_recall_seq & seq, lminf_recall_work & w) const {
        auto & tokens = w.list.tokens;

        tokens.clear();

        const auto best = has_sketches(seq) ? w.best[0].finish() : std::vector<lminf_best::entry>();

        if (has_sketches(seq) && (int64_t) best.size() >= seq.n_chosen) { // else queries are not numbers
            for (const auto & [first, second] : seq.candidates) { // those without sketches: a few
                for (int64_t i = first; i < std::min(second, seq.archive->get_learned().first); ++i) {
                    tokens.push_back(i);
                }
            }
            add_short(seq, best, tokens);
        } else {
            for (const auto & [first, second] : seq.candidates) {
                for (int64_t i = first; i < second; ++i) {
                    tokens.push_back(i);
                }
            }
        }

        constexpr size_t n_kept = 4 << 20;

        const size_t n = tokens.size()*n_scores(seq);
        w.list.scores.resize(n <= n_kept ? n : 0);
        w.list.max.resize(w.list.n_tiles()*n_scores(seq));
        w.list.sum.resize(w.list.n_tiles()*n_scores(seq));
        w.votes.resize(tokens.size());

        if (has_sketches(seq)) {
            leave_out_listed(seq, w);
        }
    }

    // The sample stands for what is not on the list: with the list alone each query's votes would be shared out there, and those
    // that look for nothing in particular would outvote the others
    void leave_out_listed(const lminf_recall_seq & seq, lminf_recall_work & w) const {
        auto & x = w.sample;

        int64_t n_left = 0;

        auto listed = w.list.tokens.begin();

        std::vector<int64_t> left;

        for (int64_t tile = 0; tile < x.n_tiles(); ++tile) {
            const int64_t n = x.tile_size(tile);

            left.clear();
            for (int64_t k = 0; k < n; ++k) {
                const int64_t token = x.tokens[tile*n_tile + k];
                while (listed != w.list.tokens.end() && *listed < token) {
                    ++listed;
                }
                if (listed == w.list.tokens.end() || *listed != token) {
                    left.push_back(k);
                }
            }
            n_left += left.size();

            const float * scores = x.scores.data() + tile*n_tile*n_scores(seq);
            float * sums = x.sum.data() + tile*n_scores(seq);
            for (int64_t i = 0; i < n_scores(seq); ++i) {
                sums[i] = 0.0f;
                for (const int64_t k : left) {
                    sums[i] += scores[i*n + k];
                }
            }
        }
        w.n_each = n_left > 0 ? (float) (seq.n_candidates - (int64_t) w.list.tokens.size())/n_left : 0.0f;
    }

    // a tile's scores [n_scores][its size]
    void dot(const lminf_recall_seq & seq, const lminf_recall_scores & x, const float * q, int64_t tile, float * scores) const {
        const int64_t n = x.tile_size(tile);

        const int64_t * tokens = x.tokens.data() + tile*n_tile;

        std::array<const char *, n_tile> rows;
        const char * segment = nullptr;
        for (int64_t k = 0; k < n; ++k) {
            if (k == 0 || tokens[k]/n_segment != tokens[k - 1]/n_segment) {
                segment = seq.archive->get_segment(tokens[k]);
            }
            rows[k] = segment + l.at_k + tokens[k] % n_segment*l.size_k;
        }

        const int64_t n_q = n_queries(seq)*(n_head/l.n_head_kv);

        for (int64_t h = 0; h < l.n_head_kv; ++h) {
            lminf_rows_dot(l.type_k, l.n_embd_head_k, rows.data(), h*ggml_row_size(l.type_k, l.n_embd_head_k), n,
                    q + h*n_q*l.n_embd_head_k, n_q, scores + h*n_q*n);
        }
        for (int64_t i = 0; logit_softcap > 0.0f && i < n_scores(seq)*n; ++i) {
            scores[i] = logit_softcap*tanhf(scores[i]/logit_softcap);
        }
    }

    // a tile's scores become exp(score - max) of each query
    void exponentiate(const lminf_recall_seq & seq, lminf_recall_scores & x, int64_t tile, float * scores) const {
        const int64_t n = x.tile_size(tile);

        for (int64_t i = 0; i < n_scores(seq); ++i) {
            const size_t at = tile*n_scores(seq) + i;

            x.sum[at] = lminf_exp(scores + i*n, n, x.max[at]);
        }
    }

    //   found  of each head, with the paper's rule
    void score(const lminf_recall_seq & seq, lminf_recall_scores & x, const float * q, std::vector<lminf_best> & found, int ith, int nth) const {
        std::vector<float> buf(x.scores.empty() ? n_scores(seq)*n_tile : 0);

        for (int64_t tile = ith; tile < x.n_tiles(); tile += nth) {
            float * scores = x.scores.empty() ? buf.data() : x.scores.data() + tile*n_tile*n_scores(seq);
            dot(seq, x, q, tile, scores);

            if (!is_paper()) {
                exponentiate(seq, x, tile, scores);
                continue;
            }
            const int64_t n = x.tile_size(tile);
            for (int64_t h = 0; h < n_head; ++h) {
                found[h].add(scores + h*n, n, tile*n_tile);
            }
        }
    }

    void vote(const lminf_recall_seq & seq, lminf_recall_work & w, int ith, int nth) const {
        auto & x = w.list;

        const int64_t n_s = n_scores(seq);

        std::vector<total> totals;
        for (int64_t i = 0; i < n_s; ++i) {
            totals.push_back(add_up(seq, x, i));
            if (has_sketches(seq)) {
                const auto others = add_up(seq, w.sample, i);
                add(totals[i], others.max, w.n_each*others.sum);
            }
        }
        if (ith == 0) {
            w.log_totals.resize(n_s);
            std::transform(totals.begin(), totals.end(), w.log_totals.begin(), [](const total & t) { return t.max + (float) log(t.sum); });
        }

        std::vector<float> buf(x.scores.empty() ? n_s*n_tile : 0);

        for (int64_t tile = ith; tile < x.n_tiles(); tile += nth) {
            const int64_t n = x.tile_size(tile);

            float * scores = x.scores.empty() ? buf.data() : x.scores.data() + tile*n_tile*n_s;
            if (x.scores.empty()) {
                dot(seq, x, w.q.data(), tile, scores);
                exponentiate(seq, x, tile, scores);
            }

            float * votes = w.votes.data() + tile*n_tile;
            std::fill(votes, votes + n, 0.0f);
            for (int64_t i = 0; i < n_s; ++i) {
                lminf_add_scaled(votes, (float) (exp(x.max[tile*n_s + i] - totals[i].max)/totals[i].sum), scores + i*n, n);
            }
        }
    }

    // Votes count for the tokens around, too, less and less: of words that come often those are found whose surroundings are looked for
    static void spread(lminf_recall_work & w) {
        const int64_t n = w.list.tokens.size();

        w.spread.assign(w.votes.begin(), w.votes.end());
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t k = i + 1; k < n && w.list.tokens[k] - w.list.tokens[i] < lminf_recall::n_near; ++k) {
                const float share = 1.0f - (float) (w.list.tokens[k] - w.list.tokens[i])/lminf_recall::n_near;

                w.spread[i] += share*w.votes[k];
                w.spread[k] += share*w.votes[i];
            }
        }
    }

    // Of what was found, the tokens with most votes, best first. Where scores are not numbers, what comes first
    static std::vector<size_t> best_first(std::vector<lminf_best::entry> found, int64_t n) {
        for (int64_t i = 0; (int64_t) found.size() < n; ++i) {
            if (std::none_of(found.begin(), found.end(), [&](const auto & each) { return each.first == i; })) {
                found.push_back({ i, 0.0f });
            }
        }
        std::stable_sort(found.begin(), found.end(), [](const auto & a, const auto & b) { return a.second > b.second; });

        std::vector<size_t> res;
        for (const auto & [i, _] : found) {
            res.push_back(i);
        }
        return res;
    }

    using text = std::vector<llama_token>;

    // tokens [i0, i1), those that are no text or no candidates as LLAMA_TOKEN_NULL
    static text read_text(const lminf_recall_seq & seq, int64_t i0, int64_t i1) {
        text res;
        for (int64_t i = i0; i < i1; ++i) {
            res.push_back(is_candidate(seq, i) ? seq.archive->get_token(i) : LLAMA_TOKEN_NULL);
        }
        return res;
    }

    // A token is understood by those around it: each hit brings its span, from the middle outwards, until there are n_chosen. One
    // whose span reads as a text that is there already, or next to it, is left out with that span, as long as there are others
    std::vector<int64_t> choose_spans(const lminf_recall_seq & seq, const lminf_recall_work & w) const {
        constexpr int64_t n_span = lminf_recall::n_span;
        constexpr int64_t n_near = lminf_recall::n_near;

        std::set<int64_t> chosen;
        std::set<int64_t> left_out;

        std::vector<text> known; // around each hit

        const auto is_copy = [&](int64_t i) {
            const text span = read_text(seq, i - n_span/2, i + n_span/2);
            return std::find(span.begin(), span.end(), LLAMA_TOKEN_NULL) == span.end() &&
                std::any_of(known.begin(), known.end(), [&](const text & each) {
                    return std::search(each.begin(), each.end(), span.begin(), span.end()) != each.end();
                });
        };
        const auto add_span = [&](int64_t i, size_t n_most, std::set<int64_t> & to) {
            for (int64_t k = 0; k < n_span && to.size() < n_most; ++k) {
                const int64_t j = k % 2 ? i - (k + 1)/2 : i + k/2;
                if (is_candidate(seq, j)) {
                    to.insert(j);
                }
            }
        };

        const size_t n = w.list.tokens.size();

        for (const bool spares_copies : { true, false }) {
            for (size_t n_hits = std::min<size_t>(seq.n_chosen, n); (int64_t) chosen.size() < seq.n_chosen; n_hits = std::min(4*n_hits, n)) {
                lminf_best best(n_hits);
                best.add(w.spread.data(), n, 0);

                for (const size_t hit : best_first(best.finish(), n_hits)) {
                    const int64_t i = w.list.tokens[hit];
                    if ((int64_t) chosen.size() == seq.n_chosen) {
                        break;
                    }
                    if (chosen.count(i) || left_out.count(i)) {
                        continue;
                    }
                    if (spares_copies && is_copy(i)) {
                        add_span(i, SIZE_MAX, left_out);
                        continue;
                    }
                    known.push_back(read_text(seq, i - n_span/2 - n_near + 1, i + n_span/2 + n_near - 1));
                    add_span(i, seq.n_chosen, chosen);
                }
                if (n_hits == n) { // there were copies among the best
                    break;
                }
            }
            left_out.clear();
        }
        return { chosen.begin(), chosen.end() };
    }

    // What is added to the scores of those chosen; nothing where all are, or where scores are not numbers
    float find_log_confidence(const lminf_recall_seq & seq, const lminf_recall_work & w, const std::vector<int64_t> & chosen) const {
        if ((int64_t) chosen.size() == seq.n_candidates) {
            return 0.0f;
        }
        lminf_recall_scores x;
        x.tokens = chosen;
        x.max.resize(x.n_tiles()*n_scores(seq));
        x.sum.resize(x.max.size());

        std::vector<lminf_best> found;
        score(seq, x, w.q.data(), found, 0, 1);

        const int64_t n_q = n_queries(seq);

        double confidence = 0.0;
        for (int64_t i = 0; i < n_q; ++i) {
            double largest = 0.0;
            for (int64_t h = 0; h < n_head; ++h) {
                const auto t = add_up(seq, x, h*n_q + i);
                largest = std::max(largest, t.sum*exp(t.max - w.log_totals[h*n_q + i])); // not if that is NaN
            }
            confidence += largest/n_q;
        }
        return confidence > 0.0 ? (float) std::min(0.0, log(confidence/lminf_recall::sure)) : 0.0f;
    }

    void choose(const lminf_recall_seq & seq, lminf_recall_work & w, lminf_recall_choice & c) const {
        const int64_t group = n_head/l.n_head_kv;

        c.tokens.resize(std::max(c.tokens.size(), il + 1));
        c.log_confidence.resize(c.tokens.size());

        auto & heads = c.tokens[il];
        heads.clear();

        if (!is_paper()) {
            spread(w);
            heads.push_back(choose_spans(seq, w));
            c.log_confidence[il] = find_log_confidence(seq, w, heads[0]);
            return;
        }
        for (int64_t h = 0; h < n_head; ++h) {
            if (h % group == 0) {
                heads.emplace_back();
            }
            auto hits = best_first(w.best[h].finish(), batch.recall.params.n_recall);
            std::sort(hits.begin(), hits.end());
            for (const size_t hit : hits) {
                heads.back().push_back(w.list.tokens[hit]);
            }
        }
    }

    void gather(const lminf_recall_seq & seq, const lminf_recall_choice & c, ggml_tensor * dst, int64_t s, int ith, int nth) const {
        const ggml_tensor * k_sink = dst->src[1];
        const ggml_tensor * v_sink = dst->src[2];

        const int64_t n_embd_k = l.n_embd_head_k*l.n_head_kv;

        for (int64_t r = ith; r < dst->ne[1]; r += nth) {
            char * dst_k = (char *) dst->data + s*dst->nb[2] + r*dst->nb[1];
            char * dst_v = dst_k + ggml_row_size(dst->type, n_embd_k);

            if (r >= n_rows) { // a sink
                const auto copy = [&](const ggml_tensor * t, char * to) {
                    convert_row(t->type, (const char *) t->data + s*t->nb[2] + (r - n_rows)*t->nb[1], t->ne[0], dst->type, to);
                };
                copy(k_sink, dst_k);
                if (v_sink) {
                    copy(v_sink, dst_v);
                }
                continue;
            }
            if (r >= n_filled(seq)) {
                memset(dst_k, 0, ggml_row_size(dst->type, dst->ne[0]));
                continue;
            }

            const auto & heads = c.tokens[il];
            if (heads.size() == 1) {
                const int64_t i       = heads[0][r];
                const char  * segment = seq.archive->get_segment(i);
                lminf_row_load(l.type_k, segment + l.at_k + i % n_segment*l.size_k, n_embd_k, dst->type, dst_k);
                if (l.n_embd_v_gqa > 0) {
                    lminf_row_load(l.type_v, segment + l.at_v + i % n_segment*l.size_v, l.n_embd_v_gqa, dst->type, dst_v);
                }
                continue;
            }
            for (int64_t h = 0; h < l.n_head_kv; ++h) {
                const int64_t i       = heads[h][r];
                const char  * segment = seq.archive->get_segment(i);
                load_key(segment, i, h, dst->type, dst_k + h*ggml_row_size(dst->type, l.n_embd_head_k));
                if (l.n_embd_v_gqa > 0) {
                    load_value(segment, i, h, dst->type, dst_v + h*ggml_row_size(dst->type, l.n_embd_v_gqa/l.n_head_kv));
                }
            }
        }
    }

    void write_confidence(const lminf_recall_seq & seq, const lminf_recall_choice & c, ggml_tensor * dst, int64_t s, int ith, int nth) const {
        auto * data = (float *) ((char *) dst->data + s*dst->nb[3]);

        for (int64_t r = ith; r < dst->ne[0]; r += nth) {
            data[r] = r < seq.n_chosen ? c.log_confidence[il] : 0.0f;
        }
    }

    void run(enum phase phase, ggml_tensor * dst, int ith, int nth) {
        for (int64_t s = 0; s < (int64_t) batch.seqs.size(); ++s) {
            const auto & seq = batch.seqs[s];

            if (phase == GATHER) {
                gather(seq, choice(s), dst, s, ith, nth);
                continue;
            }
            if (phase == CONFIDENCE) {
                write_confidence(seq, choice(s), dst, s, ith, nth);
                continue;
            }
            if (!seq.chooses || seq.n_chosen == 0) {
                continue;
            }
            auto & w = *batch.works[s];

            const auto lists = [&](int64_t n, int64_t n_best) { return std::vector<lminf_best>(n, lminf_best(n_best)); };

            if (phase == SAMPLE) {
                std::vector<float> q(n_scores(seq)*l.n_embd_head_k); // each thread needs all of them at once
                load_queries(seq, dst->src[0], s, q.data());
                if (ith == 0) {
                    std::copy(q.begin(), q.end(), w.q.begin());
                }
                if (has_sketches(seq)) {
                    std::vector<lminf_best> found;
                    score(seq, w.sample, q.data(), found, ith, nth);
                }
            } else if (phase == SCAN) {
                auto found = lists(has_sketches(seq) ? 1 : 0, n_short(seq));
                if (has_sketches(seq)) {
                    scan(seq, w, found[0], ith, nth);
                }
                finish(w, std::move(found), nth, [&] { list(seq, w); });
            } else if (phase == SCORE) {
                auto found = lists(is_paper() ? n_head : 0, batch.recall.params.n_recall);
                score(seq, w.list, w.q.data(), found, ith, nth);
                if (is_paper()) {
                    finish(w, std::move(found), nth, [&] { choose(seq, w, choice(s)); });
                }
            } else if (!is_paper()) {
                vote(seq, w, ith, nth);
                finish(w, {}, nth, [&] { choose(seq, w, choice(s)); });
            }
        }
    }
};

//
// lminf_recall_batch
//

lminf_recall_batch::lminf_recall_batch(lminf_recall & recall, int64_t n_stream) : recall(recall), seqs(n_stream), seq_ids(n_stream) {
    for (int64_t s = 0; s < n_stream; ++s) {
        works.push_back(std::make_unique<lminf_recall_work>());
    }
}

lminf_recall_batch::~lminf_recall_batch() = default;

void lminf_recall_batch::set_seq(int64_t stream, llama_seq_id seq_id, int64_t index, int64_t n_tokens, int32_t n_global, bool is_last) {
    const auto & params = recall.params;

    auto & seq    = seqs[stream];
    auto & choice = recall.choices[seq_id];

    seq_ids[stream] = seq_id;

    const bool is_paper = params.recall_rule == LMINF_RECALL_PAPER;

    // the paper's newest query finds the keys of its own batch, too
    const int64_t i1 = (is_paper ? index + n_tokens : index + 1) - params.n_local;

    seq.archive    = &recall.archives[seq_id];
    seq.index      = index;
    seq.n_tokens   = n_tokens;
    seq.candidates = seq.archive->find(n_global, i1);

    seq.n_candidates = 0;
    for (const auto & [first, second] : seq.candidates) {
        seq.n_candidates += second - first;
    }

    const int64_t n_recall = recall.n_recalls[seq_id];
    if (is_paper) {
        seq.n_chosen = is_last && n_recall == params.n_recall && seq.n_candidates >= params.n_recall ? params.n_recall : 0;
    } else {
        seq.n_chosen = std::min(n_recall, seq.n_candidates);
    }

    // again what was chosen, if that was for the tokens right before, was as much and is still there
    seq.chooses = n_tokens > 1 || index % params.recall_every == 0 || choice.index + choice.n_tokens != index ||
        choice.n_chosen != seq.n_chosen || choice.n_changes != seq.archive->get_n_changes();
    if (seq.chooses) {
        choice.index     = index;
        choice.n_tokens  = 0;
        choice.n_chosen  = seq.n_chosen;
        choice.n_changes = seq.archive->get_n_changes();

        works[stream]->take_sample(seq);
    }
    choice.n_tokens += n_tokens;

    if (params.recall_index == LMINF_RECALL_SKETCH && !is_paper) {
        seq.archive->learn(index);
    }
}

ggml_tensor * lminf_recall_batch::build_store(ggml_context * ctx, ggml_tensor * k, ggml_tensor * v, int il) {
    const auto * l = recall.layout->find(il);

    layers.push_back(std::make_unique<lminf_recall_layer>(*this, *l, il));

    ggml_tensor * args[] = { k, v };

    return ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, args, v ? 2 : 1, [](ggml_tensor * dst, int ith, int nth, void * userdata) {
        ((const lminf_recall_layer *) userdata)->store(dst->src[0], dst->src[1], ith, nth);
    }, GGML_N_TASKS_MAX, layers.back().get());
}

static void run_node(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const auto & node = *(const lminf_recall_layer::node *) userdata;
    node.layer->run(node.phase, dst, ith, nth);
}

ggml_tensor * lminf_recall_batch::build_rows(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k_sink, ggml_tensor * v_sink, ggml_tensor * stored,
        ggml_type type, int64_t n_rows, float scale, float logit_softcap, int il, const std::function<void(ggml_tensor *)> & on_cpu) {
    const auto * l = recall.layout->find(il);

    layers.push_back(std::make_unique<lminf_recall_layer>(*this, *l, il));

    auto & layer = *layers.back();
    layer.n_head        = q->ne[1];
    layer.scale         = scale;
    layer.logit_softcap = logit_softcap;
    layer.n_rows        = n_rows;
    for (auto & w : works) {
        const size_t n = q->ne[1]*std::min<int64_t>(q->ne[2]/seqs.size(), lminf_recall::n_votes);

        w->q.resize(std::max<size_t>(w->q.size(), q->ne[0]*n));
        w->sample.scores.resize(std::max<size_t>(w->sample.scores.size(), n_sample*n));
        w->sample.max   .resize(std::max<size_t>(w->sample.max   .size(), n_sample/n_tile*n));
        w->sample.sum   .resize(w->sample.max.size());
    }

    ggml_tensor * cur = stored;
    for (int phase = 0; phase < GATHER; ++phase) {
        ggml_tensor * args[] = { q, cur };

        cur = ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, args, cur ? 2 : 1, run_node, GGML_N_TASKS_MAX, &layer.nodes[phase]);
        on_cpu(cur);
    }
    layer.chosen = cur;

    ggml_tensor * args[] = { cur, k_sink, v_sink };

    cur = ggml_custom_4d(ctx, type, l->n_embd_head_k*l->n_head_kv + l->n_embd_v_gqa,
            n_rows + (k_sink ? k_sink->ne[1] : 0), seqs.size(), 1, args, !k_sink ? 1 : !v_sink ? 2 : 3, run_node, GGML_N_TASKS_MAX, &layer.nodes[GATHER]);
    on_cpu(cur);

    return cur;
}

ggml_tensor * lminf_recall_batch::build_confidence(ggml_context * ctx, int64_t n_columns, const std::function<void(ggml_tensor *)> & on_cpu) {
    auto & layer = *layers.back();

    ggml_tensor * args[] = { layer.chosen };

    ggml_tensor * res = ggml_custom_4d(ctx, GGML_TYPE_F32, n_columns, 1, 1, seqs.size(), args, 1, run_node, GGML_N_TASKS_MAX, &layer.nodes[CONFIDENCE]);
    on_cpu(res);

    return res;
}
