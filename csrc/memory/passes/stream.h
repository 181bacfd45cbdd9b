// One pass over a memory on the CPU: pending writes brought in, the row norms and the scores of a batch of keys taken
// from what is then stored; and the backward product. Kernels exist once per instruction set, see ../../cpu/isa.h.
//
// S is the storage type of a memory (float, double, BFloat16 or Float16), A the type of statistics: double for double,
// else float. Rows may lie further apart than they are long; within a row columns are adjacent.
#pragma once

#include <cstdint>

#include "../../common/scalar.h"
#include "../../cpu/isa.h"

namespace dan_fast {

template <typename S, typename A>
struct StreamPass {
  int64_t slots, columns;  // s, d
  const S* base;           // (s, d)
  int64_t row_stride;
  // Commit: new_i = kept_i base_i + sum_u weights_ui pending_u, rounded to S; where kept is 0 base is not read.
  S* stored;  // (s, d) takes the new rows, may be `base`; null: nothing is committed, the rows are those of `base`
  int64_t stored_stride;
  const A* kept;     // (s,)
  const A* weights;  // (U, s)
  int64_t pending;   // U
  const A* packed_pending;  // pack_columns of (U, d)
  // Results for the rows as they are stored.
  const A* packed_keys;  // pack_rows of (T, d)
  int64_t queries;       // T
  A* scores;             // (T, s)
  A* square_norms;       // (s,) the bits of ../row_norms.h
};

#define DAN_FAST_DECLARE_STREAM(isa)                                                                              \
  namespace isa {                                                                                                 \
  /* How many numbers pack_rows, pack_columns write for a matrix of `rows` x `columns`. */                        \
  template <typename A>                                                                                           \
  int64_t packed_rows_size(int64_t rows, int64_t columns);                                                        \
  template <typename A>                                                                                           \
  int64_t packed_columns_size(int64_t rows, int64_t columns);                                                     \
  /* A matrix laid out as stream_rows reads it: some rows, or some columns, of it at a time. */                   \
  template <typename S, typename A>                                                                               \
  void pack_rows(const S* matrix, int64_t row_stride, int64_t rows, int64_t columns, A* packed);                  \
  template <typename S, typename A>                                                                               \
  void pack_columns(const S* matrix, int64_t row_stride, int64_t rows, int64_t columns, A* packed);               \
  /* Numbers of A, aligned to 64 bytes, that stream_rows writes to on the way. */                                 \
  template <typename S, typename A>                                                                               \
  int64_t stream_scratch_size(const StreamPass<S, A>& pass);                                                      \
  /* Slots [first, last). A slot's results do not depend on the range that it is part of. It allocates nothing: */\
  /* what fails has to fail before the first row of a memory is changed. */                                       \
  template <typename S, typename A>                                                                               \
  void stream_rows(const StreamPass<S, A>& pass, int64_t first, int64_t last, A* scratch);                        \
  /* How many columns combine_columns takes at a time. */                                                         \
  template <typename A>                                                                                           \
  int64_t combine_width();                                                                                        \
  /* Columns [first, last) of out (T, d) = weights (T, s) @ base (s, d); `first` a multiple of combine_width. */  \
  template <typename S, typename A>                                                                               \
  void combine_columns(const A* weights, int64_t queries, const S* base, int64_t row_stride, int64_t slots,       \
                       int64_t columns, int64_t first, int64_t last, A* out);                                     \
  }
DAN_FAST_EACH_ISA(DAN_FAST_DECLARE_STREAM)

}  // namespace dan_fast
