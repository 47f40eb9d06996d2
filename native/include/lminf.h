// lminf: a Λ-shaped KV cache for llama.cpp, the whole C API
//
// A context made with these parameters attends, at stream position i, to
//
//   key j with i - j <  n_local                    at its true distance i - j
//   key j with i - j >= n_local and j < n_global   at distance max_distance, the same for all of them
//
// and to nothing else (LM-Infinite, Han et al., NAACL 2024, doi 10.18653/v1/2024.naacl-long.222).
// Memory and time per token are bounded by n_global + n_local, the stream has no end.
//
// With n_recall > 0 each layer attends to n_recall further keys: those of the tokens that have left the window which its
// queries look for most, in spans of text, all at distance recall_distance. They come from an archive of the last
// n_archive tokens of each sequence, in the host's memory. docs/design.md, "Recall", has the rule.
//
// Two kinds of position appear below:
//
//   stream position   int64_t    counts from the first token of the sequence, never wraps
//   graph position    llama_pos  what llama_batch.pos carries: small, moved back by whole blocks now and then
//                                ("rebased"), so that RoPE angles stay exact in f32. Only differences matter.
//
// All functions belong to the thread that owns the context, as in llama.h.

#pragma once

#include "llama.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// where a sink (one of the first n_global tokens) stands for a query that it has left the window of
enum lminf_sink_mode {
    LMINF_SINK_CEILING = 0, // at distance max_distance, all of them: LM-Infinite, the rule
    LMINF_SINK_ORDER   = 1, // in their order right before the window: StreamingLLM's positions inside the cache
    LMINF_SINK_TRUE    = 2, // at their true, ever growing distance
};

// what computes the attention; the results are the same but for rounding
enum lminf_attention {
    LMINF_ATTENTION_AUTO  = 0, // for each layer the fused operation if the device that holds it has that, else stock
    LMINF_ATTENTION_FUSED = 1, // one operation for sinks and window
    LMINF_ATTENTION_STOCK = 2, // operations that every ggml backend has
};

// what chooses the tokens that are recalled
enum lminf_recall_rule {
    LMINF_RECALL_LAYER = 0, // for all queries of a micro-batch and all heads of a layer together
    LMINF_RECALL_PAPER = 1, // LM-Infinite's code: n_recall for each query head, for the newest query of a batch alone
};

// how the archive is searched
enum lminf_recall_index {
    LMINF_RECALL_SKETCH = 0, // a short list by a sketch of each key, then its keys; all keys while there are few
    LMINF_RECALL_EXACT  = 1, // all keys
};

struct lminf_params {
    int32_t n_global;     // sinks kept, 0 or more: of every sequence, and the most that one can ask for
    int32_t n_local;      // window, 1 or more
    int32_t max_distance; // distance ceiling, 1 or more; 0: n_local
    int32_t n_slack;      // at least so many tokens can be rolled back, 0 or more; -1: 64
    int32_t sink_mode;    // enum lminf_sink_mode
    int32_t pos_bound;    // graph positions stay below this; 0: chosen
    int32_t attention;    // enum lminf_attention
    int32_t n_seq_max;    // sequences, a stream each; 0: as llama_context_params says

    int32_t n_recall;        // tokens recalled in each layer, 0: none; with the paper's rule in each query head
    int32_t recall_distance; // where they stand, 1 or more; 0: half of max_distance
    int32_t recall_from;     // the first layer that recalls, 0 or more
    int32_t recall_every;    // a choice serves decoded tokens up to the next multiple of this, 1 or more
    int32_t recall_rule;     // enum lminf_recall_rule
    int32_t recall_index;    // enum lminf_recall_index
    int32_t n_archive;       // tokens of each sequence that can be recalled, the newest; 0: 262144, or what memory or files hold
    int32_t archive_type_k;  // enum ggml_type: F32, F16, Q8_0 or Q4_0
    int32_t archive_type_v;
    uint64_t archive_bytes;  // of memory, that all archives of the process take at most; 0: half of the machine's
    uint64_t archive_disk;   // bytes of files for the archives of all sequences, as full segments are put into them by
                             // lminf_archive_map and an archive may be larger than memory; 0: archives are in memory
};

struct lminf_info {
    int64_t stream_pos;     // the stream position of the next token: tokens processed and skipped
    int64_t n_evicted;      // tokens no query can see any more, those skipped among them
    int32_t n_sink;         // sinks stored, at most n_global
    int32_t n_global;       // sinks kept of this sequence
    int32_t n_window;       // window cells in use (window and slack)
    int32_t n_cells;        // window cells allocated, per sequence
    int32_t n_rollback;     // tokens that seq_rm can take back right now; 0 with recurrent layers, but for their snapshots
    int32_t n_rebase;       // times the graph positions were moved back
    int32_t max_graph_pos;  // largest graph position ever used by this context
    int32_t pos_bound;      // what max_graph_pos stays below
    uint64_t kv_bytes;      // bytes of all buffers of the memory, all sequences; the archives come on top

    int64_t  n_archived;    // tokens in the archive, those that the window still holds among them
    int64_t  n_forgotten;   // tokens processed that are not: dropped when it was full, or lost with a state that had none
    uint64_t archive_bytes; // of this sequence, in memory
    int64_t  n_rebuild;     // tokens that lminf_rollback can take back, with the archive, where seq_rm cannot
};

// what a context's memory is made of; bytes are those of all sequences
struct lminf_parts {
    int32_t  n_layer_full;      // layers with full attention, which have the rule
    int32_t  n_layer_sliding;   // layers with a sliding window of their own, which stay as trained
    int32_t  n_layer_recurrent; // layers with a state of constant size
    int32_t  n_layer_fused;     // of the first two: computed by the fused operation
    uint64_t window_bytes;
    uint64_t sink_bytes; // with the cells that keys to select tokens by are written to
    uint64_t sliding_bytes;
    uint64_t recurrent_bytes;

    uint64_t archive_token_bytes; // of a token in an archive, sketches included; 0 without recall
    uint64_t n_archive;           // tokens that the archive of a sequence holds; 0 without recall
};

// what a model needs
enum lminf_support_type {
    LMINF_SUPPORT_REFUSED  = 0, // it cannot have a Λ cache: lminf_refusal says why
    LMINF_SUPPORT_RUNS     = 1,
    LMINF_SUPPORT_CONSTANT = 2, // it is recurrent throughout: without a Λ cache its memory and speed are constant already
};

// n_global 10, n_local 4096, max_distance 0, n_slack -1, sink_mode CEILING, pos_bound 0, attention AUTO, n_seq_max 0; n_recall 0,
// recall_distance 0, recall_from 0, recall_every 1, recall_rule LAYER, recall_index SKETCH, n_archive 0, archive types Q8_0,
// archive_bytes 0, archive_disk 0
LLAMA_API struct lminf_params lminf_default_params(void);

LLAMA_API int32_t lminf_support(const struct llama_model * model);

// why a model cannot run with these parameters, in one sentence that names its architecture; NULL if nothing speaks
// against it. A few models are only found out when their graph is built: then the context is refused the same way.
// The text is valid until the next call in this thread.
LLAMA_API const char * lminf_refusal(const struct llama_model * model);

// a context with a Λ cache, or NULL (see lminf_last_error). params.n_ctx only bounds the batch, as it sizes nothing here;
// several sequences (n_seq_max > 1) need kv_unified = false and have a stream each
LLAMA_API struct llama_context * lminf_init_from_model(
        struct llama_model * model, struct llama_context_params params, struct lminf_params lminf);

// the same for callers that reach llama_init_from_model only through a wrapper: the next context that this thread
// makes gets these parameters; NULL takes them back. False if they make no sense.
// Call it with NULL after llama_init_from_model: one that fails early has not taken them
LLAMA_API bool lminf_set_next(const struct lminf_params * params);

// one sentence about what went wrong in the last lminf or llama_init_from_model call of this thread, "" if nothing did
LLAMA_API const char * lminf_last_error(void);

// false for a context without a Λ cache; every function below then returns false, -1 or 0 as well
LLAMA_API bool lminf_enabled(const struct llama_context * ctx);

// the parameters with every default filled in; attention is FUSED if any layer has it, else STOCK, for the whole life of the
// context
LLAMA_API bool lminf_get_params(const struct llama_context * ctx, struct lminf_params * params);

LLAMA_API bool lminf_get_info(const struct llama_context * ctx, llama_seq_id seq_id, struct lminf_info * info);

// right as well for a context of a model that was loaded with llama_model_params.no_alloc, where nothing is allocated
LLAMA_API bool lminf_get_parts(const struct llama_context * ctx, struct lminf_parts * parts);

// Makes room for n_tokens more (at most n_batch), rebasing if needed, and returns the graph position of the first of
// them. Call it before llama_decode if you fill llama_batch.pos yourself; with llama_batch.pos == NULL it is done for you.
// If llama_decode fails, what it did of the micro-batch that failed is taken back; a sequence with recurrent layers that the
// micro-batch touched is empty then, as its states cannot be.
LLAMA_API llama_pos lminf_next_pos(struct llama_context * ctx, llama_seq_id seq_id, int32_t n_tokens);

// Forgets all tokens from this stream position on. False, and nothing changed, if the older cells that the next query
// needs are gone. llama_memory_seq_rm does the same in graph positions.
// With an archive of the cache's own types, or of F32, both F32 or F16, the window is made anew from that if its cells are gone.
LLAMA_API bool lminf_rollback(struct llama_context * ctx, llama_seq_id seq_id, int64_t stream_pos);

// Advances the stream by n_tokens, n_local or more, that are not processed. The next token sees the sinks, which must all
// be stored, and an empty window: of a long prompt only the first n_global tokens and the last windows need be read.
// A rollback leads back to the first token after the skip at most, or to an empty sequence. False, and nothing changed,
// if the skip is too short or sinks are missing (a sequence that keeps none may be empty).
LLAMA_API bool lminf_skip(struct llama_context * ctx, llama_seq_id seq_id, int64_t n_tokens);
// The same of these tokens: an adapter that one of them turns on (Granite Switch) is on.
LLAMA_API bool lminf_skip_tokens(struct llama_context * ctx, llama_seq_id seq_id, const llama_token * tokens, int64_t n_tokens);

// Keeps this many sinks of an empty sequence, 0 to the context's n_global, from its first token on; in force until it is
// empty again. A system prompt can be kept whole that way, whatever its length. A state brings its own number with it.
LLAMA_API bool lminf_seq_set_sinks(struct llama_context * ctx, llama_seq_id seq_id, int32_t n_global);

// From the next batch on this many tokens are recalled for the sequence, 0 to the context's n_recall; with the paper's rule all or
// none. A choice of the caller,
// not a part of the stream: it is in force until it is changed.
LLAMA_API bool lminf_seq_set_recall(struct llama_context * ctx, llama_seq_id seq_id, int32_t n_recall);

// What a sequence can recall, as it is now. A state does not hold it: it is kept beside the state, and given to the sequence
// that the state is restored to. It is shared with the sequence, not copied, and stays as it is while that goes on.
// NULL without recall. lminf_archive_get, _set and _map belong to the thread that owns the context, the others to whoever has the
// archive.
struct lminf_archived;

LLAMA_API struct lminf_archived * lminf_archive_get(const struct llama_context * ctx, llama_seq_id seq_id);

// The sequence's tokens must be the first of those that this was of, or the same: what it holds of later ones is forgotten.
// False, and nothing changed, if its keys or values have other sizes or types; that it is of the same model and KV types is the
// caller's to know. Of another context it is copied.
LLAMA_API bool lminf_archive_set(struct llama_context * ctx, llama_seq_id seq_id, const struct lminf_archived * archived);

LLAMA_API void lminf_archive_free(struct lminf_archived * archived);

// bytes of memory of all archives in this process, what several share counted once
LLAMA_API uint64_t lminf_archive_bytes(void);

// Archives in files. One is a list of segments of 1024 tokens, the last of which is not full; with `first` -1 one more that all their
// sketches need. A segment is always packed the same way: into what has the same sizes and types of the same model it can be
// added again, in any process of a machine of the same byte order.
struct lminf_segment {
    uint64_t id;       // in this process the same id and n_tokens mean the same contents; 0: that is not known
    int64_t  first;    // index in the stream of its first token
    int64_t  n_tokens;
    uint64_t size;     // bytes
};

// how many it has; the first n_max are written
LLAMA_API int32_t lminf_archive_segments(const struct lminf_archived * archived, struct lminf_segment * segments, int32_t n_max);

// writes the contents of one of these, also while the sequence goes on
LLAMA_API void lminf_archive_read(const struct lminf_archived * archived, const struct lminf_segment * segment, void * data);

// which tokens can be read, as pairs [first, last) of indices in the stream; how many pairs there are, the first n_max are written
LLAMA_API int32_t lminf_archive_ranges(const struct lminf_archived * archived, int64_t * ranges, int32_t n_max);

// an empty one for the sequences of a context; NULL without recall
LLAMA_API struct lminf_archived * lminf_archive_new(const struct llama_context * ctx);

// Adds what lminf_archive_read wrote, what has `first` -1 before all others; the segment gets the id that it has here. False if it
// does not fit, makes no sense or there is no memory for it: what it holds cannot be recalled then.
LLAMA_API bool lminf_archive_add(struct lminf_archived * archived, struct lminf_segment * segment, const void * data);

// Takes a full segment from this place of a file, as lminf_archive_read wrote it: one that is there already gives its memory back.
// The file must stay as it is while the archive or a sequence has it. False if the system cannot do that.
LLAMA_API bool lminf_archive_map(struct lminf_archived * archived, int64_t first, const char * path, uint64_t offset);

// which tokens can be read: of these n pairs, ascending, what its segments have
LLAMA_API void lminf_archive_set_ranges(struct lminf_archived * archived, const int64_t * ranges, int32_t n);

// lets an empty sequence begin at this stream position, 0 or more (for tests: no need to wait for 2^33 tokens)
LLAMA_API bool lminf_seq_start(struct llama_context * ctx, llama_seq_id seq_id, int64_t stream_pos);

// bytes of a context's memory (KV cache, recurrent states), with a Λ cache or without; of a model loaded with no_alloc, what
// they would be
LLAMA_API uint64_t lminf_memory_bytes(const struct llama_context * ctx);

// Whether this thread's last call into a grammar (llama_sampler_init_grammar, or a grammar's turn in
// llama_sampler_apply, _accept and _sample) was given up because it took too much work; asked again, it is not. Such a
// grammar is not made, or allows no token any more.
LLAMA_API bool lminf_grammar_overran(void);

// llama_tokenize that can be ended: INT32_MIN once `is_cancelled` is true, which the calling thread is asked every few
// milliseconds (with vocabularies of BPE, and while any text is searched for special tokens).
typedef bool (*lminf_is_cancelled)(void * data);

LLAMA_API int32_t lminf_tokenize(
        const struct llama_vocab * vocab, const char * text, int32_t text_len, llama_token * tokens, int32_t n_tokens_max,
        bool add_special, bool parse_special, lminf_is_cancelled is_cancelled, void * data);

#ifdef __cplusplus
}
#endif
