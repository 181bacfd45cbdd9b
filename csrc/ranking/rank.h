// Ranks of the true matches of each query, on the CPU. A rank is a count: of the gallery entries that come before the
// match, being nearer, or as near and earlier in the gallery; so nothing is sorted but a query's own matches. Gallery
// entries of the query's identity and camera are junk and not counted. Kernels exist once per instruction set, see
// ../cpu/isa.h; ranking.h runs them on threads.
//
// S is the storage type of features or distances (float, double, BFloat16 or Float16), A the type in which most of
// them are compared: double for double, else float.
#pragma once

#include <cstdint>

#include "../common/scalar.h"
#include "../cpu/isa.h"

namespace dan_fast {

// The gallery entries of each query's identity.
struct Pairs {
  int64_t queries;
  const int64_t* offsets;        // (queries + 1,) where each query's entries begin
  const int64_t* gallery;        // (offsets[queries],) places in the gallery
  const uint8_t* junk;           // (offsets[queries],) 1: of the query's camera, too
  const int64_t* match_offsets;  // (queries + 1,) as offsets, of the entries that are not junk
  int64_t* ranks;                // (match_offsets[queries],) the result: from 1, ascending within a query
};

template <typename S>
struct DistanceRows {
  const S* distances;  // (queries, gallery)
  int64_t row_stride, gallery;
};

// Features of a block of queries and of the whole gallery. The key of a pair is, in double and rounded to a multiple of
// the query's step, 1 - <q, g> / (|q| |g|) or |q|^2 + |g|^2 - 2 <q, g>, with <q, g> the sum of the d products, padded
// with zeros to a power of two and halved by adding the second half to the first until one number is left. Equal rows
// thus have equal keys wherever they stand, on every path and device.
template <typename S>
struct FeatureRows {
  bool cosine;
  int64_t width, gallery_size;
  const S* query;
  int64_t query_stride;
  const S* gallery;
  int64_t gallery_stride;
  const double* query_norms;    // cosine: |q|, at least 1e-12; else |q|^2
  const double* gallery_norms;  // cosine: |g|, at least 1e-12; else |g|^2
  const double* steps;          // (queries,)
  // Where not cosine: the largest of gallery_norms, and a power of two that brings the largest |q| or |g| near 1.
  double largest_gallery_norm, scale;
};

// What is known of each query before the gallery is compared; made by prepare_query.
template <typename A>
struct QueryState {
  int64_t stride;   // of `rows`
  A* rows;          // (queries, stride) features, scaled
  double* keys;     // (matches,) of the matches, ascending; equal ones by place
  int64_t* places;  // (matches,) in the gallery
  A* lower;         // (matches,) what compares below this comes before the match for certain
  A* upper;         // (matches,) what compares above this comes after it
  int64_t* before;  // (matches + queries,) entries that come before a match and after the one before; less the junk
};

#define DAN_FAST_DECLARE_RANK(isa)                                                                                 \
  namespace isa {                                                                                                  \
  /* |x|^2 of rows [first, last) in double, summed as the dot product of a key. */                                 \
  template <typename S>                                                                                            \
  void rank_square_norms(const S* rows, int64_t stride, int64_t width, int64_t first, int64_t last, double* out);  \
  /* One query against its row of distances; false if there is a NaN in it. */                                     \
  template <typename S, typename A>                                                                                \
  bool rank_by_distances(const DistanceRows<S>& rows, const Pairs& pairs, int64_t query);                          \
  template <typename S, typename A>                                                                                \
  void prepare_query(const FeatureRows<S>& rows, const Pairs& pairs, int64_t query, const QueryState<A>& state);   \
  /* How many gallery entries count_gallery_block takes. */                                                        \
  template <typename A>                                                                                            \
  int64_t gallery_block();                                                                                         \
  /* All queries against the gallery entries from `first` on; adds to counts, laid out as QueryState::before. */   \
  template <typename S, typename A>                                                                                \
  void count_gallery_block(const FeatureRows<S>& rows, const Pairs& pairs, const QueryState<A>& state,             \
                           int64_t first, int32_t* counts);                                                        \
  }
DAN_FAST_EACH_ISA(DAN_FAST_DECLARE_RANK)
#undef DAN_FAST_DECLARE_RANK

}  // namespace dan_fast
