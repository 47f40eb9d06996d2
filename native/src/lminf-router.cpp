#include "lminf-router.h"
#include "lminf-stream.h"

#include "models/models.h"

#include <algorithm>
#include <cmath>

std::unique_ptr<lminf_router> lminf_router::create(const llama_model & model, uint32_t n_seq_max) {
    const auto * with_router = dynamic_cast<const llama_model_granite_switch *>(&model);

    return std::unique_ptr<lminf_router>(with_router ? new lminf_router(*with_router, n_seq_max) : nullptr);
}

void lminf_router::append(llama_seq_id seq_id, int64_t index, llama_token token) {
    const auto it = model.adapter_token_to_slot.find(token);
    if (it == model.adapter_token_to_slot.end()) {
        return;
    }
    auto & all = marks[seq_id];

    const mark last = all.empty() ? mark{ -1, 0, 0 } : all.back();
    all.push_back({ index, last.n + 1, last.sum + it->second });
}

using marks_of_one = std::vector<lminf_router::mark>;

// the first mark at this index or after it
static marks_of_one::const_iterator find_mark(const marks_of_one & all, int64_t index) {
    return std::lower_bound(all.begin(), all.end(), index, [](const auto & m, int64_t i) { return m.index < i; });
}

void lminf_router::truncate(llama_seq_id seq_id, int64_t index) {
    auto & all = marks[seq_id];

    all.erase(find_mark(all, index), all.end());
}

void lminf_router::settle(llama_seq_id seq_id, int64_t index) {
    auto & all = marks[seq_id];

    // the last one before it has the counts of all before
    const auto it = find_mark(all, index);
    if (it - all.begin() > 1) {
        all.erase(all.begin(), it - 1);
    }
}

int64_t lminf_router::truncate_min(llama_seq_id seq_id) const {
    const auto & all = marks[seq_id];

    return all.empty() || all.front().n == 1 ? 0 : all.front().index + 1;
}

float lminf_router::get(llama_seq_id seq_id, int64_t index) const {
    const auto & all = marks[seq_id];
    const auto   it  = find_mark(all, index + 1);
    if (it == all.begin()) {
        return 0.0f;
    }
    const mark  & last    = *(it - 1);
    const int64_t n_plain = index + 1 - last.n;

    // exp(-gain) for each of the others, exp(gain) for these
    return (float) (last.sum/(last.n + (n_plain > 0 ? n_plain*std::exp(-2.0*model.router_gain) : 0.0)));
}

bool lminf_router::set_marks(llama_seq_id seq_id, std::vector<mark> all, int64_t n_tokens) {
    mark last = { -1, 0, 0 };
    for (const mark & m : all) {
        const bool is_first = last.n == 0; // it may stand for others before it
        if (m.index <= last.index || m.index >= n_tokens || m.n <= last.n || m.n > m.index + 1 || (!is_first && m.n > last.n + 1)) {
            return false;
        }
        const int64_t n   = m.n - last.n;
        const double  sum = (double) m.sum - (double) last.sum;
        if (sum < n || sum > (double) n*model.n_adapters || m.sum > lminf_stream::max_pos) {
            return false;
        }
        last = m;
    }
    marks[seq_id] = std::move(all);
    return true;
}
