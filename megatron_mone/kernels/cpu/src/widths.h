// Edges of the blocks that share the first-level cache with what streams past them, by instruction
// set: vectors in registers are as many as its registers allow beside one operand.
#pragma once

namespace {

constexpr int kDotVecs = 16;  // vectors of x in one piece of a sampled product
constexpr int64_t kDotNeurons = kLanes == 16 ? 32 : 64;  // of one block of sampled products
constexpr int kSumVecs = 8;                              // sums of y or dx in registers
constexpr int64_t kSumWidth = kSumVecs * kLanes;         // floats of H of one accumulation block
constexpr int64_t kSumInputs = kLanes == 16 ? 64 : 96;   // neurons of one
constexpr int64_t kGradWidth = 8 * kLanes;               // floats of H of one block of weight gradients
constexpr int64_t kGradRows = kLanes == 16 ? 64 : 96;    // rows of one

constexpr int64_t kLongestRun = 96;  // most entries of a row or neuron in one block
static_assert(kDotNeurons <= kLongestRun && kSumInputs <= kLongestRun && kGradRows <= kLongestRun,
              "the orders of runs are sized by it");
static_assert(kGradRows <= 256, "a row of a block is one byte");

}  // namespace
