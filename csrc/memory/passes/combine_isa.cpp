#include "stream.h"

#include "../../cpu/tile.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

template <typename A>
constexpr int64_t kGroup = 8 * kStrip<A>;  // columns asked for at a time: long enough pieces of a row

// One thread's columns.
template <typename S, typename A>
class Combination {
 public:
  Combination(const A* weights, int64_t queries, const S* base, int64_t row_stride, int64_t slots, int64_t first,
              int64_t last)
      : weights_(weights),
        queries_(queries),
        padded_(round_up(queries, kTileRows)),
        base_(base),
        row_stride_(row_stride),
        slots_(slots),
        first_(first),
        last_(last),
        panel_(kChain * kStrip<A>),
        sums_(padded_ * round_up(last - first, kStrip<A>)) {}

  void run() {
    // A memory without slots combines to zeros: one empty chain.
    for (int64_t slot = 0; slot == 0 || slot < slots_; slot += kChain) {
      const int64_t count = std::min(kChain, slots_ - slot);
      for (int64_t column = first_; column < last_; column += kGroup<A>) add(slot, count, column);
    }
  }

  void write(int64_t row_length, A* out) const {
    const A* strip = sums_.get();
    for (int64_t column = first_; column < last_; column += kStrip<A>, strip += padded_ * kStrip<A>) {
      const int64_t width = std::min(kStrip<A>, last_ - column);
      for (int64_t q = 0; q < queries_; ++q) std::copy_n(strip + q * kStrip<A>, width, out + q * row_length + column);
    }
  }

 private:
  // A strip of some slots, with zeros beyond the last column: what the first cache holds.
  void pack(int64_t slot, int64_t count, int64_t column) {
    const int64_t width = std::min(kStrip<A>, last_ - column);
    for (int64_t k = 0; k < count; ++k) {
      const S* from = base_ + (slot + k) * row_stride_ + column;
      A* line = panel_.get() + k * kStrip<A>;
      if (width == kStrip<A>) {
        for (int v = 0; v < kTileVectors; ++v) store(line + v * kWidth<A>, load_as<A>(from + v * kWidth<A>));
      } else {
        widen(from, width, line);
        std::fill(line + width, line + kStrip<A>, A(0));
      }
    }
  }

  void add(int64_t slot, int64_t count, int64_t group) {
    const int64_t tiles = padded_ / kTileRows;
    const int64_t strips = (end_of(group) - group + kStrip<A> - 1) / kStrip<A>;
    for (int64_t strip = 0; strip < strips; ++strip) {
      pack(slot, count, group + strip * kStrip<A>);
      A* sums = sums_.get() + ((group - first_) / kStrip<A> + strip) * padded_ * kStrip<A>;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const A* rows[kTileRows];
        point_at<kTileRows>(weights_, slots_, tile * kTileRows, queries_, slot, rows);
        multiply<kTileRows, kTileVectors>(rows, count, panel_.get(), slot > 0,
                                  sums + tile * kTileRows * kStrip<A>, kStrip<A>, 1,
                                  next_rows(slot, count, group, strip * tiles + tile, strips * tiles));
      }
    }
  }

  // The share `part` of `parts` of what pack reads next: the hardware does not predict pieces of many rows.
  PiecesAhead next_rows(int64_t slot, int64_t count, int64_t group, int64_t part, int64_t parts) const {
    const bool row_ends = end_of(group) == last_;
    const int64_t from = row_ends ? slot + kChain : slot, next = row_ends ? first_ : end_of(group);
    const int64_t rows = std::clamp<int64_t>(slots_ - from, 0, kChain), begin = rows * part / parts;
    constexpr int64_t kBytes = sizeof(S);
    return {base_ + (from + begin) * row_stride_ + next, (end_of(next) - next) * kBytes, row_stride_ * kBytes,
            rows * (part + 1) / parts - begin, count};
  }

  int64_t end_of(int64_t group) const { return std::min(last_, group + kGroup<A>); }

  const A* weights_;
  const int64_t queries_, padded_;
  const S* base_;
  const int64_t row_stride_, slots_, first_, last_;
  Scratch<A> panel_;  // (kChain, kStrip)
  Scratch<A> sums_;   // (strips, padded queries, kStrip)
};

}  // namespace

template <typename A>
int64_t combine_width() {
  return kStrip<A>;
}

template <typename S, typename A>
void combine_columns(const A* weights, int64_t queries, const S* base, int64_t row_stride, int64_t slots,
                     int64_t columns, int64_t first, int64_t last, A* out) {
  if (queries == 0 || first >= last) return;
  Combination<S, A> combination(weights, queries, base, row_stride, slots, first, last);
  combination.run();
  combination.write(columns, out);
}

template int64_t combine_width<float>();
template int64_t combine_width<double>();

#define DAN_FAST_INSTANTIATE(S, A)                                                                   \
  template void combine_columns<S, A>(const A*, int64_t, const S*, int64_t, int64_t, int64_t, int64_t, \
                                      int64_t, A*);
DAN_FAST_EACH_STORAGE(DAN_FAST_INSTANTIATE)

}  // namespace dan_fast::DAN_FAST_ISA
