#include "stream.h"

#include "../../cpu/tile.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

constexpr int kStreamRows = 6, kStreamVectors = kRegisters == 32 ? 4 : 2;

template <typename A>
constexpr int64_t kPanel = kStreamVectors * kWidth<A>;  // queries, or columns of pending keys, at a time

// Queries of a block in whole vectors: a few keys do not cost as much as many.
template <typename A>
int64_t padded_queries(int64_t left) {
  return std::min(kPanel<A>, round_up(left, kWidth<A>));
}

// Slots that stay in the cache between commit, scores and norms.
template <typename A>
int64_t block_rows(int64_t columns) {
  constexpr int64_t kBlockBytes = 200 << 10;
  const int64_t rows = kBlockBytes / (std::max<int64_t>(1, columns) * static_cast<int64_t>(sizeof(A)));
  return std::clamp<int64_t>(rows / kStreamRows, 1, 8) * kStreamRows;
}

template <typename A, typename Ahead>
void multiply_panel(int64_t width, const A* const* rows, int64_t count, const A* panel, bool add, A* out, Ahead ahead) {
  static_assert(kStreamVectors == 2 || kStreamVectors == 4);
  switch (width / kWidth<A>) {
    case 1:
      return multiply<kStreamRows, 1>(rows, count, panel, add, out, kPanel<A>, 1, ahead);
    case 2:
      return multiply<kStreamRows, 2>(rows, count, panel, add, out, kPanel<A>, 1, ahead);
    case 3:
      if constexpr (kStreamVectors == 4) multiply<kStreamRows, 3>(rows, count, panel, add, out, kPanel<A>, 1, ahead);
      return;
    default:
      return multiply<kStreamRows, kStreamVectors>(rows, count, panel, add, out, kPanel<A>, 1, ahead);
  }
}

// Compilers make two vectors of half the width of the conversion.
inline Vector<double> load_as_double(const float* from) {
#if defined(__AVX512F__)
  return _mm512_cvtps_pd(_mm256_loadu_ps(from));
#elif defined(__AVX2__)
  return _mm256_cvtps_pd(_mm_loadu_ps(from));
#else
  return __builtin_convertvector((load_bits<Vector<float, kVectorBytes / 2>>(from)), Vector<double>);
#endif
}

// Squared norms of R rows: eight partial sums a row in double, added up as ../row_norms.h does; `rows` may repeat.
template <int R, typename A>
inline void square_norms_of(const A* const* rows, int64_t columns, A* norms) {
  constexpr int64_t kSums = 8;
  constexpr int kVectors = kSums / kWidth<double>;
  Vector<double> sums[R][kVectors] = {};
  int64_t c = 0;
  for (; c + kSums <= columns; c += kSums) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int part = 0; part < kVectors; ++part) {
        const A* from = rows[r] + c + part * kWidth<double>;
        if constexpr (std::is_same_v<A, double>) {
          const Vector<double> x = load(from);
          sums[r][part] += x * x;
        } else {
          const Vector<double> x = load_as_double(from);
          // The square of a float is exact in double: fused or not, the bits are the same.
          sums[r][part] = multiply_add(x, x, sums[r][part]);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    double lanes[kSums];
    std::memcpy(lanes, sums[r], sizeof lanes);
    for (int64_t at = c, lane = 0; at < columns; ++at, ++lane) {
      const double x = rows[r][at];
      lanes[lane] += x * x;
    }
    norms[r] = static_cast<A>(add_halves<kSums>(lanes));
  }
}

// One thread's blocks of slots, with `scratch` for what lies between.
template <typename S, typename A>
class Stream {
 public:
  Stream(const StreamPass<S, A>& pass, A* scratch)
      : pass_(pass),
        block_(block_rows<A>(pass.columns)),
        wide_(scratch),
        shares_(wide_ + wide_size(pass, block_)),
        sums_(shares_ + shares_size(pass, block_)) {}

  static int64_t scratch_size(const StreamPass<S, A>& pass) {
    const int64_t block = block_rows<A>(pass.columns);
    return wide_size(pass, block) + shares_size(pass, block) + block * kPanel<A>;
  }

  void run(int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row += block_) {
      const int64_t rows = std::min(block_, last - row);
      if (pass_.stored != nullptr) commit(row, rows);
      const A* block;
      int64_t stride;
      if constexpr (kIsWide) {
        stride = pass_.stored == nullptr ? pass_.row_stride : pass_.stored_stride;
        block = (pass_.stored == nullptr ? pass_.base : pass_.stored) + row * stride;
      } else {
        stride = pass_.columns;
        block = wide_;
        for (int64_t r = 0; pass_.stored == nullptr && r < rows; ++r) {
          widen(pass_.base + (row + r) * pass_.row_stride, stride, wide_ + r * stride);
        }
      }
      scores(block, stride, row, rows);
      norms(block, stride, row, rows);
    }
  }

 private:
  static constexpr bool kIsWide = std::is_same_v<S, A>;
  static constexpr int64_t kLine = 64 / sizeof(A);  // no two threads write to one cache line

  static int64_t wide_size(const StreamPass<S, A>& pass, int64_t block) {
    return kIsWide ? 0 : round_up(block * pass.columns, kLine);
  }
  static int64_t shares_size(const StreamPass<S, A>& pass, int64_t block) {
    return pass.stored == nullptr ? 0 : round_up(block * pass.pending, kLine);
  }

  void commit(int64_t row, int64_t rows) {
    const int64_t pending = pass_.pending, columns = pass_.columns;
    for (int64_t u = 0; u < pending; ++u) {
      const A* from = pass_.weights + u * pass_.slots + row;
      for (int64_t r = 0; r < rows; ++r) shares_[r * pending + u] = from[r];
    }
    const A* panel = pass_.packed_pending;
    for (int64_t column = 0; column < columns; column += kPanel<A>, panel += pending * kPanel<A>) {
      const int64_t width = std::min(kPanel<A>, columns - column);
      for (int64_t tile = 0; tile < rows; tile += kStreamRows) {
        const A* tile_rows[kStreamRows];
        point_at<kStreamRows>(shares_, pending, tile, rows, 0, tile_rows);
        const auto finish = [=](int r, int v, Vector<A> sum) {
          const int64_t c = v * kWidth<A>;
          if (tile + r < rows && c < width) keep(row, tile + r, column + c, width - c, sum);
        };
        // Where what is read is not written to, prefetching it makes a commit of M and M' a third slower.
        if (pass_.stored != pass_.base) {
          multiply_each<kStreamRows, kStreamVectors>(tile_rows, pending, panel, 1, NothingAhead{}, finish);
          continue;
        }
        const PiecesAhead ahead = next_tile(row + tile, pass_.queries == 0 ? column : columns, width, pending);
        multiply_each<kStreamRows, kStreamVectors>(tile_rows, pending, panel, 1, ahead, finish);
      }
    }
  }

  // new = kept * base + sum for up to a vector of columns of a slot, row `r` of the block from `row` on.
  void keep(int64_t row, int64_t r, int64_t column, int64_t left, Vector<A> values) const {
    const S* from = pass_.base + (row + r) * pass_.row_stride + column;
    S* to = pass_.stored + (row + r) * pass_.stored_stride + column;
    const A kept = pass_.kept[row + r];
    if (left >= kWidth<A>) {
      if (kept != 0) values = multiply_add(broadcast(kept), load_as<A>(from), values);
      values = store_as<S, A>(to, values);
    } else {
      if (kept != 0) values = multiply_add(broadcast(kept), load_some_as<A>(from, left), values);
      values = store_some_as<S, A>(to, values, left);
    }
    // What is stored of a half-precision memory.
    if constexpr (!kIsWide) store_up_to<A>(wide_ + r * pass_.columns + column, values, left);
  }

  void scores(const A* block, int64_t stride, int64_t row, int64_t rows) {
    const A* panel = pass_.packed_keys;
    for (int64_t query = 0; query < pass_.queries; query += kPanel<A>) {
      const int64_t width = padded_queries<A>(pass_.queries - query);
      // A memory without columns has scores, too: one empty chain.
      for (int64_t k = 0; k == 0 || k < pass_.columns; k += kChain) {
        const int64_t count = std::min(kChain, pass_.columns - k);
        for (int64_t tile = 0; tile < rows; tile += kStreamRows) {
          const A* tile_rows[kStreamRows];
          point_at<kStreamRows>(block, stride, tile, rows, k, tile_rows);
          const PiecesAhead ahead = next_tile(row + tile, query == 0 ? k : pass_.columns, count, count);
          multiply_panel(width, tile_rows, count, panel, k > 0, sums_ + tile * kPanel<A>, ahead);
        }
        panel += count * width;
      }
      for (int64_t q = 0; q < std::min(width, pass_.queries - query); ++q) {
        A* to = pass_.scores + (query + q) * pass_.slots + row;
        for (int64_t r = 0; r < rows; ++r) to[r] = sums_[r * kPanel<A> + q];
      }
    }
  }

  // Columns of a tile of the next block, over `count` factors: the hardware does not predict as many rows at a time.
  PiecesAhead next_tile(int64_t row, int64_t column, int64_t columns, int64_t count) const {
    const int64_t next = std::min(pass_.slots, row + block_), rows = std::min<int64_t>(kStreamRows, pass_.slots - next);
    constexpr int64_t kBytes = sizeof(S);
    return {pass_.base + next * pass_.row_stride + column, columns * kBytes, pass_.row_stride * kBytes,
            column < pass_.columns ? rows : 0, count};
  }

  void norms(const A* block, int64_t stride, int64_t row, int64_t rows) {
    constexpr int kRows = kVectorBytes == 64 ? 6 : kVectorBytes == 32 ? 4 : 2;
    for (int64_t tile = 0; tile < rows; tile += kRows) {
      const A* tile_rows[kRows];
      A tile_norms[kRows];
      point_at<kRows>(block, stride, tile, rows, 0, tile_rows);
      square_norms_of<kRows>(tile_rows, pass_.columns, tile_norms);
      for (int64_t r = 0; r < std::min<int64_t>(kRows, rows - tile); ++r) {
        pass_.square_norms[row + tile + r] = tile_norms[r];
      }
    }
  }

  const StreamPass<S, A>& pass_;
  const int64_t block_;
  A* const wide_;    // (block, d) rows of a half-precision memory in A
  A* const shares_;  // (block, U) weights of the block's slots
  A* const sums_;    // (block, kPanel)
};

}  // namespace

template <typename A>
int64_t packed_rows_size(int64_t rows, int64_t columns) {
  return round_up(rows, kWidth<A>) * columns;
}

template <typename A>
int64_t packed_columns_size(int64_t rows, int64_t columns) {
  return rows * round_up(columns, kPanel<A>);
}

// Blocks of kPanel rows, transposed, with zeros for the rows that fill up a vector.
template <typename S, typename A>
void pack_rows(const S* matrix, int64_t row_stride, int64_t rows, int64_t columns, A* packed) {
  constexpr int64_t kPiece = kWidth<A>;
  for (int64_t row = 0; row < rows; row += kPanel<A>) {
    const int64_t width = padded_queries<A>(rows - row);
    for (int64_t c = 0; c < columns; c += kPiece) {
      const int64_t count = std::min(kPiece, columns - c);
      for (int64_t r = 0; r < width; ++r) {
        A piece[kPiece] = {};
        if (row + r < rows) widen(matrix + (row + r) * row_stride + c, count, piece);
        for (int64_t i = 0; i < count; ++i) packed[(c + i) * width + r] = piece[i];
      }
    }
    packed += columns * width;
  }
}

// Strips of kPanel columns, with zeros beyond the last one.
template <typename S, typename A>
void pack_columns(const S* matrix, int64_t row_stride, int64_t rows, int64_t columns, A* packed) {
  for (int64_t column = 0; column < columns; column += kPanel<A>) {
    const int64_t width = std::min(kPanel<A>, columns - column);
    for (int64_t row = 0; row < rows; ++row, packed += kPanel<A>) {
      widen(matrix + row * row_stride + column, width, packed);
      std::fill(packed + width, packed + kPanel<A>, A(0));
    }
  }
}

template <typename S, typename A>
int64_t stream_scratch_size(const StreamPass<S, A>& pass) {
  return Stream<S, A>::scratch_size(pass);
}

template <typename S, typename A>
void stream_rows(const StreamPass<S, A>& pass, int64_t first, int64_t last, A* scratch) {
  Stream<S, A>(pass, scratch).run(first, last);
}

template int64_t packed_rows_size<float>(int64_t, int64_t);
template int64_t packed_rows_size<double>(int64_t, int64_t);
template int64_t packed_columns_size<float>(int64_t, int64_t);
template int64_t packed_columns_size<double>(int64_t, int64_t);

#define DAN_FAST_INSTANTIATE(S, A)                                        \
  template void pack_rows<S, A>(const S*, int64_t, int64_t, int64_t, A*);    \
  template void pack_columns<S, A>(const S*, int64_t, int64_t, int64_t, A*); \
  template int64_t stream_scratch_size<S, A>(const StreamPass<S, A>&);       \
  template void stream_rows<S, A>(const StreamPass<S, A>&, int64_t, int64_t, A*);
DAN_FAST_EACH_STORAGE(DAN_FAST_INSTANTIATE)

}  // namespace dan_fast::DAN_FAST_ISA
