// Blocks of memory for large results on the CPU, reused by the next result of their size. The allocator would give them
// back to the operating system, and fresh pages take longer than the kernel that fills them: 26 MB 4 ms of 10 on two
// cores. A training step asks for the same sizes again and again; on a GPU PyTorch itself reuses memory.
#pragma once

#include <torch/csrc/stable/device.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <vector>

#include "check.h"

namespace dan_fast {

class ReusedBlocks {
 public:
  // Of smaller results the allocator keeps the pages itself.
  static constexpr size_t kSmallest = size_t{4} << 20;

  // Never destroyed: a tensor may be freed after all static objects.
  static ReusedBlocks& instance() {
    static ReusedBlocks* const blocks = new ReusedBlocks;
    return *blocks;
  }

  // Null where there is no memory.
  void* take(size_t bytes) {
    // Without waiting for the lock: a process that was forked while another thread held it would wait for ever.
    if (const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock); lock) {
      const auto found = std::find_if(blocks_.begin(), blocks_.end(), [=](const Block& b) { return b.bytes == bytes; });
      if (found != blocks_.end()) {
        void* memory = found->memory;
        blocks_.erase(found);
        return memory;
      }
    }
    constexpr size_t kPage = 4096;
    return std::aligned_alloc(kPage, (bytes + kPage - 1) / kPage * kPage);
  }

  void give_back(void* memory, size_t bytes) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return std::free(memory);
    blocks_.push_back({memory, bytes});
    if (blocks_.size() <= kBlocks) return;
    std::free(blocks_.front().memory);
    blocks_.erase(blocks_.begin());
  }

 private:
  // The gradients of a map and of its classifier, and the images of two batches.
  static constexpr size_t kBlocks = 4;

  struct Block {
    void* memory;
    size_t bytes;
  };

  std::mutex mutex_;
  std::vector<Block> blocks_;  // the one longest unused first
};

// A dense CPU tensor in a reused block where it is large, else torch.empty's, which is `ordinary`. Like that of a NumPy
// array, its storage cannot be resized.
template <typename Ordinary>
Tensor in_reused_block(Sizes sizes, Sizes strides, ScalarType dtype, size_t bytes, const Ordinary& ordinary) {
  if (bytes < ReusedBlocks::kSmallest) return ordinary();
  void* memory = ReusedBlocks::instance().take(bytes);
  if (memory == nullptr) return ordinary();  // which says that there is none
  return torch::stable::from_blob(
      memory, sizes, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype,
      [bytes](void* freed) { ReusedBlocks::instance().give_back(freed, bytes); });
}

// torch.empty_like of a dense CPU tensor.
inline Tensor reused_empty_like(const Tensor& like) {
  const size_t bytes = static_cast<size_t>(like.numel()) * like.element_size();
  return in_reused_block(like.sizes(), like.strides(), like.scalar_type(), bytes,
                        [&] { return torch::stable::empty_like(like); });
}

}  // namespace dan_fast
