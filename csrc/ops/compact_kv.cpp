// Native entry of compact_kv: checks, params, implementation.
#include "ops/checks.h"
#include "ops/run.h"

namespace kvcomp {
namespace {

constexpr const char* kStateNames[] = {"state[0]", "state[1]", "state[2]", "state[3]",
                                       "state[4]", "state[5]", "state[6]", "state[7]"};
static_assert(std::size(kStateNames) == CompactKvParams::kMaxState);

// The victims of a row and unit: how many, after a look at each.
int check_victims(const Boundary& at, const CompactKvParams& p, int batch, int unit) {
  const std::int32_t* victims =
      p.victims + (std::int64_t{batch} * p.num_units + unit) * p.num_victims;
  const std::int32_t length = p.seq_lens[batch];
  const auto fail = [&](std::int32_t got) {
    at.fail("victims", "slots within the row's " + std::to_string(length) + ", ascending, then -1",
            std::to_string(got) + " in row " + std::to_string(batch) + ", unit " +
                std::to_string(unit));
  };
  int count = 0;
  for (std::int32_t last = -1; count < p.num_victims && victims[count] != -1; ++count) {
    if (victims[count] <= last || victims[count] >= length) fail(victims[count]);
    last = victims[count];
  }
  for (int i = count; i < p.num_victims; ++i) {
    if (victims[i] != -1) fail(victims[i]);
  }
  return count;
}

// Lengths, victims and the room for state fit together; readable tensors only.
void check_values(const Boundary& at, const CompactKvParams& p, std::int64_t num_slots,
                  const TensorView* state) {
  check_seq_lens(at, p.seq_lens, p.batch, "T", num_slots);
  const std::int32_t longest = *std::max_element(p.seq_lens, p.seq_lens + p.batch);
  for (int i = 0; i < p.num_state; ++i) {
    if (state[i].shape[2] >= longest) continue;
    at.fail(state[i].name, "room for " + std::to_string(longest) + " tokens", state[i].shape[2]);
  }
  for (int b = 0; b < p.batch; ++b) {
    const int count = check_victims(at, p, b, 0);
    for (int unit = 1; unit < p.num_units; ++unit) {
      const int other = check_victims(at, p, b, unit);
      if (other == count) continue;
      at.fail("victims",
              "as many in every unit of a row, " + std::to_string(count) + " as in unit 0",
              std::to_string(other) + " in row " + std::to_string(b) + ", unit " +
                  std::to_string(unit));
    }
  }
}

}  // namespace

void compact_kv(Backend backend, py::handle k_, py::handle v_, py::handle state_,
                py::handle victims_, py::handle seq_lens_, std::uintptr_t stream) {
  const Boundary at{"compact_kv"};
  const TensorView k = at.tensor("k", k_), v = at.tensor("v", v_);
  const TensorView victims = at.tensor("victims", victims_);
  const TensorView seq_lens = at.tensor("seq_lens", seq_lens_);
  at.device(backend, {&k, &v, &victims, &seq_lens});
  at.dtype(k, {DType::f32, DType::f16, DType::bf16, DType::i8});
  at.same_dtype(v, k);
  at.dtype(victims, {DType::i32});
  at.dtype(seq_lens, {DType::i32});
  at.last_contiguous(k);
  at.last_contiguous(v);
  at.contiguous(victims);
  at.contiguous(seq_lens);
  Dim B{"B"}, H{"H"}, T{"T"}, D{"D"}, Dv{"Dv"}, U{"U"}, V{"V"};
  at.shape(k, {B, H, T, D});
  at.shape(v, {B, H, T, Dv});
  at.shape(victims, {B, U, V});
  at.shape(seq_lens, {B});
  if (B.size < 1) at.fail("k", "at least one sequence", B.size);
  if (H.size < 1) at.fail("k", "at least one head", H.size);
  if (U.size != 1 && U.size != H.size) {
    at.fail("victims", "U of 1 or H=" + std::to_string(H.size), U.size);
  }
  check_size(at, k, "tokens", T.size);
  check_size(at, victims, "victims", V.size);
  const std::int64_t size = k.dtype == DType::f32 ? 4 : k.dtype == DType::i8 ? 1 : 2;
  check_size(at, k, "bytes of a row", D.size * size);
  check_size(at, v, "bytes of a row", Dv.size * size);
  const TensorView& values = Dv.size ? v : k;  // of no columns, nothing is read

  CompactKvParams params{
      .k = k.data,
      .v = values.data,
      .state = {},
      .victims = victims.as<std::int32_t>(),
      .seq_lens = seq_lens.as<std::int32_t>(),
      .stride_k_b = k.strides[0] * size,
      .stride_k_h = k.strides[1] * size,
      .stride_k_t = k.strides[2] * size,
      .stride_v_b = values.strides[0] * size,
      .stride_v_h = values.strides[1] * size,
      .stride_v_t = values.strides[2] * size,
      .stride_state_b = {},
      .stride_state_u = {},
      .state_units = {},
      .batch = static_cast<std::int32_t>(B.size),
      .num_heads = static_cast<std::int32_t>(H.size),
      .num_units = static_cast<std::int32_t>(U.size),
      .num_slots = static_cast<std::int32_t>(T.size),
      .num_victims = static_cast<std::int32_t>(V.size),
      .num_state = 0,
      .k_bytes = static_cast<std::int32_t>(D.size * size),
      .v_bytes = static_cast<std::int32_t>(Dv.size * size),
  };
  TensorView state[CompactKvParams::kMaxState];
  if (!PyList_Check(state_.ptr())) {
    at.fail("state", "a list of tensors", Py_TYPE(state_.ptr())->tp_name);
  }
  const Py_ssize_t num_state = PyList_GET_SIZE(state_.ptr());
  if (num_state > CompactKvParams::kMaxState) {
    at.fail("state", "at most " + std::to_string(CompactKvParams::kMaxState) + " tensors",
            num_state);
  }
  for (int i = 0; i < num_state; ++i) {
    state[i] = at.tensor(kStateNames[i], PyList_GET_ITEM(state_.ptr(), i));
    at.device(backend, {&k, &state[i]});
    at.dtype(state[i], {DType::i32, DType::f32});
    at.last_contiguous(state[i]);
    Dim units{"U", state[i].ndim > 1 && state[i].shape[1] == H.size ? H.size : U.size};
    at.shape(state[i], {B, units, kAny});
    params.state_units[i] = static_cast<std::int32_t>(units.size);
    params.state[i] = state[i].data;
    params.stride_state_b[i] = state[i].strides[0] * 4;
    params.stride_state_u[i] = state[i].strides[1] * 4;
    params.num_state = i + 1;
    params.num_slots =
        static_cast<std::int32_t>(std::min<std::int64_t>(params.num_slots, state[i].shape[2]));
  }

  if (readable(backend)) check_values(at, params, T.size, state);
  run<cpu::compact_kv, cuda::compact_kv>(at, backend, params, k.device, stream);
}

KVCOMP_OP(compact_kv);

}  // namespace kvcomp
