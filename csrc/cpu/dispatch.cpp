#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

// One table per instruction set that was compiled (YOCO_WITH_<ISA> comes from CMake).
#define YOCO_DECLARE(isa)     \
  namespace yoco::cpu::isa {  \
  const KernelTable* table(); \
  }
YOCO_DECLARE(portable)
#ifdef YOCO_WITH_AVX2
YOCO_DECLARE(avx2)
#endif
#ifdef YOCO_WITH_AVX512
YOCO_DECLARE(avx512)
#endif
#ifdef YOCO_WITH_AVX512_BF16
YOCO_DECLARE(avx512_bf16)
#endif
#ifdef YOCO_WITH_AMX
YOCO_DECLARE(amx)
#endif

namespace yoco::cpu {
namespace {

struct Features {
  bool avx2 = false, avx512 = false, avx512_bf16 = false, amx = false;
};

#if defined(__x86_64__)
uint64_t enabled_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Tile registers are off until the process asks Linux for them.
bool request_amx() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Features detect() {
  Features f;
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const bool osxsave = c & (1u << 27), fma = c & (1u << 12), f16c = c & (1u << 29);
  if (!osxsave) return f;
  const uint64_t state = enabled_state();
  uint32_t b7, c7, d7;
  if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return f;
  const uint32_t max_subleaf = a;
  f.avx2 = (state & 0x6) == 0x6 && (b7 & (1u << 5)) && fma && f16c;
  // F, DQ, BW, VL and the mask and upper-half register states.
  const uint32_t avx512 = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);
  f.avx512 = f.avx2 && (state & 0xe6) == 0xe6 && (b7 & avx512) == avx512;
  if (max_subleaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) f.avx512_bf16 = f.avx512 && (a & (1u << 5));
  const bool amx_bf16 = (d7 & (1u << 22)) && (d7 & (1u << 24)), avx512_vbmi = c7 & (1u << 1);
  f.amx = f.avx512_bf16 && avx512_vbmi && amx_bf16 && (state & (3u << 17)) == (3u << 17) && request_amx();
  return f;
}
#else
Features detect() { return {}; }
#endif

const KernelTable* pick() {
  const char* wanted = std::getenv("YOCO_CPU_ISA");
  if (wanted != nullptr && *wanted == 0) wanted = nullptr;
  std::string available;
  // Takes the function, not its result: code for an instruction set this CPU lacks must not run.
  const auto offer = [&](const char* isa, bool supported, const KernelTable* (*table)()) -> const KernelTable* {
    if (!supported) return nullptr;
    available += std::string(available.empty() ? "" : ", ") + isa;
    return wanted == nullptr || std::strcmp(wanted, isa) == 0 ? table() : nullptr;
  };
  [[maybe_unused]] const Features f = detect();
#ifdef YOCO_WITH_AMX
  if (const auto* t = offer("amx", f.amx, amx::table)) return t;
#endif
#ifdef YOCO_WITH_AVX512_BF16
  if (const auto* t = offer("avx512_bf16", f.avx512_bf16, avx512_bf16::table)) return t;
#endif
#ifdef YOCO_WITH_AVX512
  if (const auto* t = offer("avx512", f.avx512, avx512::table)) return t;
#endif
#ifdef YOCO_WITH_AVX2
  if (const auto* t = offer("avx2", f.avx2, avx2::table)) return t;
#endif
  if (const auto* t = offer("portable", true, portable::table)) return t;
  throw std::runtime_error(std::string("YOCO_CPU_ISA is '") + wanted + "'; available here: " + available);
}

}  // namespace

const KernelTable* kernels() {
  static const KernelTable* table = pick();
  return table;
}

}  // namespace yoco::cpu
