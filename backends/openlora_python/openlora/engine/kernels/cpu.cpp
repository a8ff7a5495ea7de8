// Whether this CPU has what the compiler was told to use.

extern "C" int cpu_is_right() {
    bool right = true;
#ifdef __x86_64__
    __builtin_cpu_init();
#ifdef __AVX2__
    right = right && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#ifdef __AVX512F__
    right = right && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl");
#endif
#ifdef __AVX512BF16__
    right = right && __builtin_cpu_supports("avx512bf16");
#endif
#ifdef __AVX512VNNI__
    right = right && __builtin_cpu_supports("avx512vnni");
#endif
#endif
    return right;
}
