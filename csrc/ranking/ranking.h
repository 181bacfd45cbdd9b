// The kernels of rank.h on threads. Plain C++17; what is allocated is freed at the end of a call, and an exception of
// a thread comes out of the call.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "rank.h"

namespace dan_fast {

// What the calling thread calls ten times a second, between two parts; what it throws ends the work.
using Poll = std::function<void()>;

// Calls work(thread, part) for each part in [0, parts), on up to `threads` threads, each part once.
template <typename Work>
void on_threads(int64_t threads, int64_t parts, const Poll& poll, const Work& work) {
  using Clock = std::chrono::steady_clock;
  std::atomic<int64_t> next{0};
  std::exception_ptr failed;
  std::mutex lock;
  const auto run = [&](int64_t thread) {
    try {
      auto polled = Clock::now();
      for (int64_t part; (part = next++) < parts;) {
        work(thread, part);
        if (thread > 0 || Clock::now() - polled < std::chrono::milliseconds(100)) continue;
        poll();
        polled = Clock::now();
      }
    } catch (...) {
      next = parts;
      const std::lock_guard<std::mutex> guard(lock);
      failed = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(std::max<int64_t>(0, threads - 1)));
  try {
    for (int64_t thread = 1; thread < std::min(threads, parts); ++thread) others.emplace_back(run, thread);
  } catch (...) {
    // The system has no more threads, or no memory for one: those that there are do all of it.
  }
  run(0);
  for (std::thread& other : others) other.join();
  if (failed) std::rethrow_exception(failed);
}

template <typename S>
void square_norms(const S* rows, int64_t stride, int64_t count, int64_t width, int64_t threads, const Poll& poll,
                  double* out) {
  constexpr int64_t kRows = 256;
  on_threads(threads, (count + kRows - 1) / kRows, poll, [&](int64_t, int64_t part) {
    DAN_FAST_KERNEL(rank_square_norms<S>)
    (rows, stride, width, part * kRows, std::min(count, (part + 1) * kRows), out);
  });
}

// False if a distance is NaN; the ranks are then of no use.
template <typename S, typename A>
bool rank_distances(const DistanceRows<S>& rows, const Pairs& pairs, int64_t threads, const Poll& poll) {
  std::atomic<bool> numbers{true};
  on_threads(threads, pairs.queries, poll, [&](int64_t, int64_t query) {
    if (!DAN_FAST_KERNEL(rank_by_distances<S, A>)(rows, pairs, query)) numbers = false;
  });
  return numbers;
}

template <typename S, typename A>
void rank_features(const FeatureRows<S>& rows, const Pairs& pairs, int64_t threads, const Poll& poll) {
  const int64_t queries = pairs.queries, matches = pairs.match_offsets[queries], buckets = matches + queries;
  // Rows a power of two apart would share a few sets of the first-level cache.
  const int64_t stride = (rows.width + 31) / 16 * 16;
  const auto size = [](int64_t count) { return static_cast<size_t>(count); };
  std::vector<A> scaled(size(queries * stride)), lower(size(matches)), upper(size(matches));
  std::vector<double> keys(size(matches));
  std::vector<int64_t> places(size(matches)), before(size(buckets));
  const QueryState<A> state{
      stride, scaled.data(), keys.data(), places.data(), lower.data(), upper.data(), before.data()};
  on_threads(threads, queries, poll, [&](int64_t, int64_t query) {
    DAN_FAST_KERNEL(prepare_query<S, A>)(rows, pairs, query, state);
  });

  const int64_t block = DAN_FAST_KERNEL(gallery_block<A>)(), blocks = (rows.gallery_size + block - 1) / block;
  std::vector<std::vector<int32_t>> counts(size(std::max<int64_t>(1, std::min(threads, blocks))));
  on_threads(static_cast<int64_t>(counts.size()), blocks, poll, [&](int64_t thread, int64_t part) {
    std::vector<int32_t>& own = counts[size(thread)];
    own.resize(size(buckets));
    DAN_FAST_KERNEL(count_gallery_block<S, A>)(rows, pairs, state, part * block, own.data());
  });
  for (const std::vector<int32_t>& own : counts) {
    for (size_t i = 0; i < own.size(); ++i) before[i] += own[i];
  }
  for (int64_t query = 0; query < queries; ++query) {
    int64_t rank = 1;
    for (int64_t m = pairs.match_offsets[query]; m < pairs.match_offsets[query + 1]; ++m) {
      pairs.ranks[m] = rank += before[size(m + query)];
    }
  }
}

}  // namespace dan_fast
