// Few query tokens against a long cache: split-KV attention that reads K and V once for all query rows that share them.
// The splits' partial results (decode_worker.h) are merged in order.
#include "decode_worker.h"

namespace yoco::cpu::YOCO_ISA {
namespace {

// The tasks of one segment and what they leave behind.
template <class C>
struct Pass {
  Plan plan;
  Partials<C> partials;
  size_t count, acc_bytes;
  Scratch scratch;

  Pass(const DecodeParams& p, bool latents, int64_t element_size, int num_threads)
      : plan(p, latents, element_size, num_threads),
        partials{p.heads_kv, p.heads_q / p.heads_kv * p.time_q, (p.dim_v + 63) / 64 * 64, nullptr, nullptr},
        count(plan.slots() * p.heads_kv * partials.rows),
        acc_bytes(rounded(count * partials.stride * sizeof(C))),
        scratch(bytes()) {
    partials.acc = scratch.template as<C>();
    partials.state = scratch.template as<RowState<C>>(acc_bytes);
  }
  size_t bytes() const { return acc_bytes + count * sizeof(RowState<C>); }

  // False when memory ran out.
  template <class Q, class Cache, class Products>
  bool run(const DecodeParams& p, const Launch& launch) {
    if (scratch.failed(bytes())) return false;
    std::atomic<int64_t> next_task{0};
    std::atomic<bool> complete{true};
    const int64_t threads = launch.num_threads < plan.tasks() ? launch.num_threads : plan.tasks();
    parallel(launch, threads, 1, [&](int64_t, int64_t) {
      Worker<Q, Cache, Products> worker(p, plan, partials);
      if (worker.failed()) {
        complete = false;
      } else {
        worker.run(&next_task);
      }
    });
    return complete;
  }
};

// out = sum of the splits' accumulators, each weighed by its share of the softmax, for all query rows of one KV head.
template <class Q>
void merge(const DecodeParams& p, const Pass<Compute<Q>>* const* passes, int64_t b, int64_t head) {
  using C = Compute<Q>;
  constexpr C kInfinity = static_cast<C>(INFINITY);
  const int64_t group = p.heads_q / p.heads_kv, rows = group * p.time_q, stride = passes[0]->partials.stride;
  alignas(64) C total[256];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t time = r / group, head_q = head * group + r % group;
    const auto for_each_split = [&](const auto& f) {
      for (int i = 0; i < 2; ++i) {
        const Pass<C>& pass = *passes[i];
        for (int64_t s = pass.plan.slots_begin(b); s < pass.plan.slots_end(b); ++s) {
          f(pass.partials.state_of(s, head)[r], pass.partials.acc_of(s, head) + r * stride);
        }
      }
    };
    const C sink = p.sinks != nullptr ? static_cast<C>(p.sinks[head_q] * kLog2E) : -kInfinity;
    C max = sink;
    for_each_split([&](RowState<C> state, const C*) { max = max > state.max ? max : state.max; });
    const C base = max == -kInfinity ? C{0} : max;
    C sum = p.sinks != nullptr ? static_cast<C>(std::exp2(sink - base)) : C{0};
    for (int64_t d = 0; d < p.dim_v; ++d) total[d] = 0;
    for_each_split([&](RowState<C> state, const C* acc) {
      if (state.sum == 0) return;  // saw nothing
      const C share = static_cast<C>(std::exp2(state.max - base));
      sum += state.sum * share;
      for (int64_t d = 0; d < p.dim_v; ++d) total[d] += acc[d] * share;
    });
    const C inverse = sum == 0 ? C{0} : 1 / sum;
    Q* out =
        static_cast<Q*>(p.out.data) + b * p.out.batch_stride + time * p.out.time_stride + head_q * p.out.head_stride;
    for_each_vector<C>(p.dim_v, [&](auto io) { io.store(out, io.load(total) * inverse); });
    const C lse = sum == 0 ? -kInfinity : static_cast<C>((max + std::log2(sum)) * kLn2);
    static_cast<C*>(p.lse)[(b * p.heads_q + head_q) * p.time_q + time] = lse;
  }
}

// Up to this many query rows per KV head the vector products are faster than setting up tiles (measured); beyond, the
// tiles keep up with memory for longer.
constexpr int64_t kVectorRows = 4;

template <class Q, class Cache>
bool run_pass(Pass<Compute<Q>>* pass, const DecodeParams& p, const Launch& launch) {
#if YOCO_HAS_AMX
  if constexpr (std::is_same_v<Q, BFloat16>) {
    if (pass->partials.rows > kVectorRows) return pass->template run<Q, Cache, TileProducts<Cache>>(p, launch);
  }
#endif
  return pass->template run<Q, Cache, VectorProducts<Compute<Q>, Cache>>(p, launch);
}

template <class Q, class Cache>
const char* run(const DecodeParams& p, const Launch& launch) {
  using C = Compute<Q>;
  Pass<C> cache(p, false, sizeof(Cache), launch.num_threads), latents(p, true, sizeof(Q), launch.num_threads);
  if (!run_pass<Q, Cache>(&cache, p, launch)) return "out of memory";
  if (!run_pass<Q, Q>(&latents, p, launch)) return "out of memory";
  const Pass<C>* passes[2] = {&cache, &latents};
  const int64_t splits = 1 + (cache.plan.slots() + latents.plan.slots()) / (p.batch + 1);
  const int64_t work = cache.partials.rows * cache.partials.stride * splits;  // of one (sequence, KV head)
  parallel(launch, p.batch * p.heads_kv, 1 + 16384 / (work + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) merge<Q>(p, passes, i / p.heads_kv, i % p.heads_kv);
  });
  return nullptr;
}

}  // namespace

const char* decode(const DecodeParams& p, const Launch& launch) {
  if (const char* error = check_decode(p)) return error;
  return with_float_type(p.dtype, [&](auto type) -> const char* {
    using Q = decltype(type);
    if (p.cache_dtype == p.dtype) return run<Q, Q>(p, launch);
    if (p.cache_dtype == DType::kInt8) return run<Q, int8_t>(p, launch);
    if (p.cache_dtype == DType::kFloat8E4M3) return run<Q, Float8>(p, launch);
    return "k_cache must have the dtype of q, float8_e4m3fn or int8";
  });
}

}  // namespace yoco::cpu::YOCO_ISA
