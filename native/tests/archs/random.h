// random operations on the sequences of a context, against fresh runs of what they should have come to

#pragma once

#include <cstdint>

struct llama_model;

// prints one line of JSON; 0 if it could be run at all
int test_random(llama_model * model, int n_rounds, uint32_t seed);
