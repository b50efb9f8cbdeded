// The pool of host rows, as the ops that read and write it are given it.
#pragma once

#include <array>
#include <string>

#include "ops/checks.h"
#include "tensor.h"

namespace kvcomp {

inline const char* pool_block_name(int i) {
  static const auto names = [] {
    std::array<std::string, PoolBlocks::kMaxBlocks> names;
    for (std::size_t i = 0; i < names.size(); ++i) names[i] = "pool[" + std::to_string(i) + "]";
    return names;
  }();
  return names[i].c_str();
}

constexpr std::int64_t kWordRoom = 16;  // bytes of a word in a row of codes, which stays aligned

// A list of blocks [B, H, R, 2, D] of k's dtype, [B, H, R, D + Dv] where V differs in size, or of
// codes [B, H, R, 2 D + 16]. They are in host
// memory wherever k is; that they are pinned where k is on a GPU is for the caller to see to:
// asking the driver costs more than the rest of the call.
inline PoolBlocks pool_blocks(const Boundary& at, py::handle list, const TensorView& k, Dim& B,
                              Dim& H, Dim& D, const Dim& Dv) {
  if (!PyList_Check(list.ptr())) at.fail("pool", "a list of tensors", Py_TYPE(list.ptr())->tp_name);
  const Py_ssize_t count = PyList_GET_SIZE(list.ptr());
  if (count < 1 || count > PoolBlocks::kMaxBlocks) {
    at.fail("pool", "1 to " + std::to_string(PoolBlocks::kMaxBlocks) + " tensors", count);
  }
  PoolBlocks pool{};
  std::int64_t rows = 0;
  for (int i = 0; i < count; ++i) {
    const TensorView block = at.tensor(pool_block_name(i), PyList_GET_ITEM(list.ptr(), i));
    if (block.device.is_cuda) at.fail(block.name, "a tensor in host memory", "one on a GPU");
    at.same_dtype(block, k);
    at.contiguous(block);
    if (k.dtype == DType::i8) {
      at.shape(block, {B, H, kAny, 2 * D.size + kWordRoom});
    } else if (D.size == Dv.size) {
      at.shape(block, {B, H, kAny, 2, D});
    } else {
      at.shape(block, {B, H, kAny, D.size + Dv.size});
    }
    pool.data[i] = block.data;
    rows += block.shape[2];
    check_size(at, block, "rows in all blocks", rows);
    pool.first_row[i + 1] = static_cast<std::int32_t>(rows);
  }
  pool.num_blocks = static_cast<std::int32_t>(count);
  const std::int64_t columns = D.size + Dv.size;
  const std::int64_t bytes = k.dtype == DType::i8    ? columns + kWordRoom
                             : k.dtype == DType::f32 ? 4 * columns
                                                     : 2 * columns;
  pool.row_bytes = static_cast<std::int32_t>(bytes);
  return pool;
}

inline std::int32_t num_rows(const PoolBlocks& pool) { return pool.first_row[pool.num_blocks]; }

}  // namespace kvcomp
