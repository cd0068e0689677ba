// Edges of the blocks that share the first-level cache with what streams past them, by instruction
// set: vectors in registers are as many as its registers allow beside one operand.
#pragma once

namespace {

constexpr int64_t kSpan = 64;  // neurons of one block of sampled products, accumulations and gradients
constexpr int kDotVecs = kLanes == 16 ? 8 : 16;  // vectors of x in one piece of a sampled product
constexpr int kSumVecs = 8;                      // most sums of y or dx in registers
constexpr int64_t kGradWidth = 64;  // floats of H of one block of weight gradients
constexpr int64_t kGradRows = 128;  // rows of one
constexpr int64_t kGradBlocks = kTile / kGradRows;  // of one tile of rows

static_assert(kTile % kGradRows == 0 && kGradRows <= 256, "a row of a block of gradients is one byte");
static_assert(kSpan <= 255 && kTile <= 65536, "neurons and lengths are one byte, rows of a tile two");

}  // namespace
