#include "lminf-archive.h"
#include "lminf-pages.h"

#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <new>

constexpr int64_t n_segment = lminf_archive_layout::n_segment;

// tokens that axes are found from
constexpr int64_t n_first = 16; // the first tokens' keys are like no others
constexpr int64_t n_learn = n_segment - n_first;

static ggml_type fit_type(ggml_type type, int64_t n_embd) {
    return n_embd % ggml_blck_size(type) == 0 ? type : GGML_TYPE_F16;
}

lminf_archive_layout::lminf_archive_layout(const llama_model & model, const lminf_cparams & params, const std::vector<int32_t> & layers_kv,
        const std::map<int32_t, int32_t> & reuse) {
    const auto & hparams = model.hparams;

    const auto add = [&](size_t size) {
        const size_t at = segment_size;
        segment_size += GGML_PAD(size, 64);
        return at;
    };

    for (const int32_t il : layers_kv) {
        layer l;

        l.n_head_kv     = hparams.n_head_kv(il);
        l.n_embd_head_k = hparams.n_embd_head_k(il);
        l.n_embd_v_gqa  = hparams.is_mla() ? 0 : hparams.n_embd_v_gqa(il);
        l.type_k        = fit_type(params.archive_type_k, l.n_embd_head_k);
        l.type_v        = hparams.is_mla() ? l.type_k : fit_type(params.archive_type_v, hparams.n_embd_head_v(il));
        l.size_k        = ggml_row_size(l.type_k, l.n_embd_head_k*l.n_head_kv);
        l.size_v        = ggml_row_size(l.type_v, l.n_embd_v_gqa);
        l.at_k          = add(n_segment*l.size_k);
        l.at_v          = add(n_segment*l.size_v);
        l.at_sketch     = add(n_segment/lminf_n_lanes*l.n_head_kv*lminf_sketch_size());

        map_layer_ids[il] = layers.size();
        layers.push_back(l);
    }
    at_tokens = add(n_segment*get_token_size());

    size_t free  = 0;
    size_t total = 0;
    ggml_backend_dev_memory(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), &free, &total);
    if (params.archive_bytes > 0) {
        max_bytes = params.archive_bytes;
    } else if (total > 0) {
        max_bytes = total/2;
    }

    for (const auto & [il, il_keys] : reuse) {
        const auto it = map_layer_ids.find(il_keys);
        if (it != map_layer_ids.end()) {
            map_layer_ids[il] = it->second;
        }
    }
}

bool lminf_archive_layout::operator==(const lminf_archive_layout & other) const {
    const auto same = [](const layer & a, const layer & b) {
        return a.type_k == b.type_k && a.type_v == b.type_v && a.n_head_kv == b.n_head_kv && a.n_embd_head_k == b.n_embd_head_k &&
            a.n_embd_v_gqa == b.n_embd_v_gqa;
    };
    return map_layer_ids == other.map_layer_ids && std::equal(layers.begin(), layers.end(), other.layers.begin(), other.layers.end(), same);
}

size_t lminf_archive_layout::get_packed_size(int64_t n) const {
    size_t res = n*get_token_size();
    for (const auto & l : layers) {
        res += n*(l.size_k + l.size_v) + l.n_head_kv*((n + lminf_n_lanes - 1)/lminf_n_lanes)*lminf_sketch_size();
    }
    return res;
}

size_t lminf_archive_layout::get_axes_size() const {
    size_t res = 2*sizeof(int64_t);
    for (const auto & l : layers) {
        res += l.n_head_kv*l.n_embd_head_k*(1 + lminf_n_dirs)*sizeof(float);
    }
    return res;
}

static std::atomic<size_t>  n_bytes_alive;
static std::atomic<int64_t> last_id;

size_t lminf_archive::n_bytes_all() {
    return n_bytes_alive;
}

size_t lminf_archive::n_bytes() const {
    return layout->get_segment_size()*std::count_if(segments.begin(), segments.end(), [](const auto & each) { return !each.second->is_mapped; });
}

std::shared_ptr<lminf_archive::segment> lminf_archive::new_segment() const {
    const size_t size = layout->get_segment_size();
    if (n_bytes_alive + size > layout->get_max_bytes()) {
        return nullptr;
    }

    const std::shared_ptr<char[]> pages = lminf_new_pages(size);
    if (!pages) {
        return nullptr;
    }
    n_bytes_alive += size;

    char * data = pages.get();

    auto res = std::make_shared<segment>();
    res->data = std::shared_ptr<char[]>(data, [size, pages](char *) { n_bytes_alive -= size; });
    res->id   = ++last_id;
    for (const auto & l : layout->get_layers()) { // not all of them get to be written
        memset(data + l.at_sketch, 0, n_segment/lminf_n_lanes*l.n_head_kv*lminf_sketch_size());
    }
    return res;
}

void lminf_archive::zero_rows(segment & s, int64_t row0, int64_t row1) const {
    for (const auto & l : layout->get_layers()) {
        memset(s.data.get() + l.at_k + row0*l.size_k, 0, (row1 - row0)*l.size_k);
        memset(s.data.get() + l.at_v + row0*l.size_v, 0, (row1 - row0)*l.size_v);
    }
    memset(s.data.get() + layout->get_at_tokens() + row0*layout->get_token_size(), 0, (row1 - row0)*layout->get_token_size());
}

llama_token lminf_archive::get_token(int64_t i) const {
    return ((const llama_token *) (get_segment(i) + layout->get_at_tokens()))[i % n_segment];
}

bool lminf_archive::assign(const lminf_archive & other, int64_t i1, bool copies) {
    if (!(*layout == *other.layout)) {
        return false;
    }
    clear();

    ranges      = other.ranges;
    learned     = other.learned;
    segments    = other.segments;
    layers_axes = other.layers_axes;

    truncate(i1);
    if (!copies) {
        return true;
    }

    for (auto & [i, shared] : segments) {
        if (shared->is_mapped) {
            continue;
        }
        auto made = new_segment();
        if (!made) {
            clear();
            return true; // without memory it begins anew
        }
        memcpy(made->data.get(), shared->data.get(), layout->get_segment_size());
        made->n_tokens = shared->n_tokens;
        made->id       = shared->id;
        shared = std::move(made);
    }
    for (auto & axes_of_layer : layers_axes) {
        axes_of_layer = std::make_shared<axes>(*axes_of_layer);
    }
    return true;
}

void lminf_archive::append(int64_t i0, int64_t n, const llama_token * tokens) {
    const int64_t i1 = i0 + n;

    const auto write = [&](segment & s, int64_t i, int64_t row0, int64_t row1) {
        auto * dst = (llama_token *) (s.data.get() + layout->get_at_tokens());
        for (int64_t row = row0; row < row1 && layout->get_token_size() > 0; ++row) {
            dst[row] = tokens ? tokens[i*n_segment + row - i0] : LLAMA_TOKEN_NULL;
        }
        s.n_tokens = row1;
    };

    truncate(i0);

    // in steps, so that a choice stays valid for a while
    int64_t n_over = n_tokens() + n - n_max;
    if (n_over > 0) {
        const int64_t step = std::clamp<int64_t>(n_max/8, 1, n_segment);
        n_over = (n_over + step - 1)/step*step;
    }
    while (n_over > 0 && !ranges.empty()) {
        const int64_t n_gone = std::min(n_over, ranges.front().second - ranges.front().first);
        forget(ranges.front().first + n_gone);
        n_over -= n_gone;
    }

    for (int64_t i = i0/n_segment; i <= (i1 - 1)/n_segment; ++i) {
        const int64_t row0 = std::max<int64_t>(i0 - i*n_segment, 0);
        const int64_t row1 = std::min(i1 - i*n_segment, n_segment);

        const auto it = segments.find(i);
        if (it != segments.end() && ((it->second.use_count() == 1 && !it->second->is_mapped) || it->second->n_tokens <= row0)) {
            auto & s = *it->second;
            if (s.n_tokens < row0) {
                zero_rows(s, s.n_tokens, row0);
            } else if (s.n_tokens > row0) {
                s.id = ++last_id;
            }
            write(s, i, row0, row1);
            continue;
        }

        std::shared_ptr<segment> made = new_segment();
        while (!made && segments.size() > 1 && segments.begin()->first < i0/n_segment) {
            if (!is_short) {
                is_short = true;
                LLAMA_LOG_WARN("%s: archives have all the memory that they may have, with %lld tokens in this one: its oldest are forgotten\n", __func__, (long long) n_tokens());
            }
            forget((segments.begin()->first + 1)*n_segment);
            made = new_segment();
        }
        if (!made) {
            if (!is_short) {
                is_short = true;
                LLAMA_LOG_WARN("%s: archives have all the memory that they may have: tokens from %lld on will not be recalled\n", __func__, (long long) i0);
            }
            truncate(i*n_segment);
            return;
        }
        if (it != segments.end()) {
            memcpy(made->data.get(), it->second->data.get(), layout->get_segment_size());
        } else {
            zero_rows(*made, 0, row0);
        }
        write(*made, i, row0, row1);
        segments[i] = std::move(made);
    }

    if (ranges.empty() || ranges.back().second != i0) {
        ranges.push_back({ i0, i1 });
    } else {
        ranges.back().second = i1;
    }
}

void lminf_archive::forget(int64_t i1) {
    if (!ranges.empty() && ranges.front().first < i1) {
        n_changes++;
    }
    while (!ranges.empty() && ranges.front().first < i1) {
        if (ranges.front().second > i1) {
            ranges.front().first = i1;
        } else {
            ranges.erase(ranges.begin());
        }
    }
    while (!segments.empty() && (segments.begin()->first + 1)*n_segment <= i1) {
        segments.erase(segments.begin());
    }
}

void lminf_archive::truncate(int64_t i0) {
    if (!ranges.empty() && ranges.back().second > i0) {
        n_changes++;
    }
    while (!ranges.empty() && ranges.back().second > i0) {
        if (ranges.back().first < i0) {
            ranges.back().second = i0;
        } else {
            ranges.pop_back();
        }
    }
    while (!segments.empty() && segments.rbegin()->first*n_segment >= i0) {
        segments.erase(std::prev(segments.end()));
    }
    if (learned.second > i0) {
        forget_axes(); // what comes instead may be another text
    }
    for (const auto & axes_of_layer : layers_axes) {
        if (std::any_of(axes_of_layer->begin(), axes_of_layer->end(), [](const auto & a) { return a.n_embd == 0; })) {
            forget_axes(); // a micro-batch that was to find them failed
            break;
        }
    }
}

void lminf_archive::forget_axes() {
    layers_axes.clear();
    learned = { 0, 0 };
}

void lminf_archive::clear() {
    n_changes++;
    ranges.clear();
    segments.clear();
    forget_axes();
}

void lminf_archive::learn(int64_t i0) {
    if (!layers_axes.empty()) {
        return;
    }
    for (const auto & [first, second] : ranges) {
        // within one segment: who goes back to before its end has one of their own from then on
        int64_t from = std::max(first, n_first);
        if (from/n_segment != (from + n_learn - 1)/n_segment) {
            from = GGML_PAD(from, n_segment);
        }
        if (from + n_learn > std::min(second, i0)) {
            continue;
        }
        learned = { from, from + n_learn };
        for (const auto & l : layout->get_layers()) {
            layers_axes.push_back(std::make_shared<axes>(l.n_head_kv));
        }
        return;
    }
}

std::vector<lminf_archive::range> lminf_archive::find(int64_t i0, int64_t i1) const {
    std::vector<range> res;
    for (const auto & [first, second] : ranges) {
        if (std::max(first, i0) < std::min(second, i1)) {
            res.push_back({ std::max(first, i0), std::min(second, i1) });
        }
    }
    return res;
}

int64_t lminf_archive::n_tokens() const {
    int64_t res = 0;
    for (const auto & [first, second] : ranges) {
        res += second - first;
    }
    return res;
}

//
// files
//

template <typename F>
void lminf_archive::for_stretches(int64_t n, F fun) const {
    const size_t size_head = (n + lminf_n_lanes - 1)/lminf_n_lanes*lminf_sketch_size();

    for (const auto & l : layout->get_layers()) {
        fun(l.at_k, n*l.size_k);
        fun(l.at_v, n*l.size_v);
        for (int64_t h = 0; h < l.n_head_kv; ++h) {
            fun(l.at_sketch + h*(n_segment/lminf_n_lanes*lminf_sketch_size()), size_head);
        }
    }
    fun(layout->get_at_tokens(), n*layout->get_token_size());
}

template <typename F>
void lminf_archive::for_floats(std::vector<std::shared_ptr<axes>> & layers_axes, F fun) {
    for (const auto & axes_of_layer : layers_axes) {
        for (auto & head : *axes_of_layer) {
            for (auto * part : { &head.mean, &head.axes }) {
                fun(part->data(), part->size());
            }
        }
    }
}

std::vector<lminf_segment> lminf_archive::get_segments() const {
    std::vector<lminf_segment> res;
    if (!layers_axes.empty()) {
        res.push_back({ 0, -1, 0, layout->get_axes_size() });
    }
    for (const auto & [i, s] : segments) {
        int64_t n = 0;
        for (const auto & [first, second] : find(i*n_segment, (i + 1)*n_segment)) {
            n = second - i*n_segment;
        }
        if (n > 0) { // its sketches are made once there are axes
            res.push_back({ (uint64_t) s->id*2 + !layers_axes.empty(), i*n_segment, n, layout->get_packed_size(n) });
        }
    }
    return res;
}

void lminf_archive::read(const lminf_segment & part, char * dst) const {
    const auto copy = [&](const void * src, size_t size) {
        memcpy(dst, src, size);
        dst += size;
    };
    if (part.first < 0) {
        const int64_t i[] = { learned.first, learned.second };
        copy(i, sizeof(i));

        auto all = layers_axes;
        for_floats(all, [&](const float * x, size_t n) { copy(x, n*sizeof(float)); });
        return;
    }
    // another thread may just put a file into its place
    const std::shared_ptr<char[]> data = std::atomic_load(&segments.at(part.first/n_segment)->data);

    for_stretches(part.n_tokens, [&](size_t at, size_t size) { copy(data.get() + at, size); });
}

bool lminf_archive::add(lminf_segment & part, const char * src) {
    const auto copy = [&](void * dst, size_t size) {
        memcpy(dst, src, size);
        src += size;
    };
    if (part.first < 0) {
        if (part.size != layout->get_axes_size()) {
            return false;
        }
        int64_t i[2];
        copy(i, sizeof(i));

        bool ok = i[0] >= 0 && i[0] < INT64_MAX - n_segment && i[1] == i[0] + n_learn && i[0]/n_segment == (i[1] - 1)/n_segment;

        std::vector<std::shared_ptr<axes>> all;
        for (const auto & l : layout->get_layers()) {
            all.push_back(std::make_shared<axes>(l.n_head_kv));
            for (auto & head : *all.back()) {
                head.n_embd = l.n_embd_head_k;
                head.mean.resize(l.n_embd_head_k);
                head.axes.resize(l.n_embd_head_k*lminf_n_dirs);
            }
        }
        for_floats(all, [&](float * x, size_t n) {
            copy(x, n*sizeof(float));
            ok = ok && std::all_of(x, x + n, [](float each) { return std::isfinite(each); });
        });
        if (ok) {
            learned     = { i[0], i[1] };
            layers_axes = std::move(all);
        }
        return ok;
    }

    if (part.first % n_segment != 0 || part.n_tokens < 1 || part.n_tokens > n_segment || part.size != layout->get_packed_size(part.n_tokens) ||
            segments.count(part.first/n_segment) > 0) {
        return false;
    }
    const auto made = new_segment();
    if (!made) {
        return false;
    }
    for_stretches(part.n_tokens, [&](size_t at, size_t size) { copy(made->data.get() + at, size); });

    made->n_tokens = part.n_tokens;
    segments[part.first/n_segment] = made;
    part.id = (uint64_t) made->id*2 + !layers_axes.empty();
    return true;
}

bool lminf_archive::map(int64_t first, const char * path, size_t offset) {
    const size_t size = layout->get_segment_size();
    if (first < 0 || first % n_segment != 0 || size != layout->get_packed_size(n_segment)) {
        return false;
    }
    const auto data = lminf_map_file(path, offset, size);
    if (!data) {
        return false;
    }
    auto & s = segments[first/n_segment];
    if (!s) {
        s = std::make_shared<segment>();
        s->id       = ++last_id;
        s->n_tokens = n_segment;
    } else if (s->n_tokens != n_segment) {
        return false;
    }
    std::atomic_store(&s->data, data);
    s->is_mapped = true;
    return true;
}

void lminf_archive::set_ranges(const std::vector<range> & wanted) {
    ranges.clear();
    for (const auto & [i, s] : segments) {
        for (const auto & [first, second] : wanted) {
            const int64_t i0 = std::max(first,  i*n_segment);
            const int64_t i1 = std::min(second, i*n_segment + s->n_tokens);

            if (i0 >= i1 || (!ranges.empty() && ranges.back().second > i0)) {
                continue;
            }
            if (!ranges.empty() && ranges.back().second == i0) {
                ranges.back().second = i1;
            } else {
                ranges.push_back({ i0, i1 });
            }
        }
    }
}
