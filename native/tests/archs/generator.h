// a tiny random model of every architecture that llama.cpp knows, and of the variants that its generator leaves out

#pragma once

#include "ggml-backend.h"
#include "llama-cpp.h"

#include <string>
#include <vector>

struct llama_model;
struct gguf_context;

struct arch_model {
    std::string arch;
    std::string variant; // "" for what upstream's generator makes
    bool        moe;

    void (*edit)(gguf_context * metadata) = nullptr; // keys of the file that the variant has, or lacks
    void (*tune)(llama_model & model)     = nullptr; // what no key says

    std::string name() const { return variant.empty() ? arch : arch + "/" + variant; }
};

std::vector<arch_model> all_arch_models();

// throws if llama.cpp cannot make it; without weights only its sizes can be asked for; with a device all layers are there
llama_model_ptr make_model(const arch_model & model, bool has_weights = true, ggml_backend_dev_t device = nullptr);

std::vector<llama_token> random_tokens(uint32_t n_tokens, size_t seed);

// infinite unless both have the same number of values, all finite
double error_between(const std::vector<float> & expected, const std::vector<float> & actual);
