#include "false_sets.h"

#include <cstring>

#include "cpu_loops.h"
#include "select.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

int64_t count(const int64_t* labels, int64_t slots, int64_t label) {
  int64_t found = 0;
  for (int64_t i = 0; i < slots; ++i) found += labels[i] == label;
  return found;
}

int64_t count_occupied(const int64_t* labels, int64_t slots) {
  int64_t found = 0;
  for (int64_t i = 0; i < slots; ++i) found += labels[i] >= 0;
  return found;
}

template <typename S>
void find_keys(
    int64_t size, const typename FloatBits<S>::Bits* __restrict evaluation, const int64_t* __restrict labels,
    ValueKey<S>* __restrict keys) {
  using Key = ValueKey<S>;
  for (int64_t i = 0; i < size; ++i) {
    const Key key = value_key<S>(evaluation[i]);
    keys[i] = labels[i] >= 0 ? key : Key(0);
  }
}

template <typename Key>
void find_members(
    int64_t size, const Key* __restrict keys, const int64_t* __restrict labels, int64_t label, const Cut<Key>& cut,
    uint8_t* __restrict false_positive, uint8_t* __restrict false_negative) {
  for (int64_t i = 0; i < size; ++i) {
    const bool same = labels[i] == label, chosen = cut.chooses(keys[i], i);
    false_positive[i] = same & !chosen;
    false_negative[i] = !same & chosen;
  }
}

}  // namespace

template <typename S>
void find_false_sets(const FalseSets& sets, int64_t first, int64_t last) {
  using Key = ValueKey<S>;
  const int64_t slots = sets.slots, occupied = count_occupied(sets.labels, slots);
  const Scratch<Key> keys(slots);
  const Scratch<int64_t> places(slots);
  for (int64_t row = first; row < last; ++row) {
    const int64_t label = sets.pseudo_labels[row];
    uint8_t* false_positive = sets.false_positive + row * slots;
    uint8_t* false_negative = sets.false_negative + row * slots;
    const int64_t same = label < 0 ? 0 : count(sets.labels, slots, label);
    // T is empty, or all of the occupied slots: there is no set.
    if (same == 0 || same == occupied) {
      std::memset(false_positive, 0, static_cast<size_t>(slots));
      std::memset(false_negative, 0, static_cast<size_t>(slots));
      continue;
    }
    const auto* evaluation = static_cast<const typename FloatBits<S>::Bits*>(sets.evaluation) + row * slots;
    find_keys<S>(slots, evaluation, sets.labels, keys.get());
    // Empty slots have the key 0, below all others: the `same` largest are never among them.
    const auto cut = cut_of_largest(keys.get(), slots, same, kValueKeyBits<S>, places.get());
    find_members(slots, keys.get(), sets.labels, label, cut, false_positive, false_negative);
  }
}

#define DAN_FAST_INSTANTIATE(S, A) template void find_false_sets<S>(const FalseSets&, int64_t, int64_t);
DAN_FAST_EACH_STORAGE(DAN_FAST_INSTANTIATE)

}  // namespace dan_fast::DAN_FAST_ISA
