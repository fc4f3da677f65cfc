// Multiply-add in registers, the most a core can do: many independent sums, no memory.
// One function a precision; each does `rounds` rounds on the calling thread and returns the operations it did (a
// multiplication and an addition count as two), 0 where the processor this is compiled for has no such instruction.
#include <cstdint>
#include <immintrin.h>

namespace {

constexpr int kSums = 12;  // more than latency times throughput, and no more than AVX2's registers hold

template <class Vector, class Step>
double run(int64_t rounds, Vector zero, int operations, Step step) {
    Vector sums[kSums];
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) sums[i] = zero;
    for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
        for (int i = 0; i < kSums; ++i) {
            sums[i] = step(sums[i]);
            asm volatile("" : "+v"(sums[i]));  // keep every step, and the sums in registers
        }
    }
    return double(rounds) * kSums * operations;
}

}  // namespace

extern "C" {

double fp32(int64_t rounds) {
#if defined(__AVX512F__)
    const __m512 a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(0.25f);
    return run(rounds, _mm512_setzero_ps(), 32, [=](__m512 sum) { return _mm512_fmadd_ps(a, b, sum); });
#elif defined(__FMA__)
    const __m256 a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(0.25f);
    return run(rounds, _mm256_setzero_ps(), 16, [=](__m256 sum) { return _mm256_fmadd_ps(a, b, sum); });
#else
    return 0.0 * rounds;
#endif
}

double bf16(int64_t rounds) {
#if defined(__AVX512BF16__)
    const __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f00);  // 0.5
    return run(rounds, _mm512_setzero_ps(), 64, [=](__m512 sum) { return _mm512_dpbf16_ps(sum, a, a); });
#else
    return 0.0 * rounds;
#endif
}

double int8(int64_t rounds) {
#if defined(__AVX512VNNI__)
    const __m512i a = _mm512_set1_epi8(1);
    return run(rounds, _mm512_setzero_si512(), 128, [=](__m512i sum) { return _mm512_dpbusd_epi32(sum, a, a); });
#else
    return 0.0 * rounds;
#endif
}

}
