// Whether this CPU has what the library it is part of was built for beyond the AVX-512 or AVX2 that its name begins with.

extern "C" int sparse_fcmae_supported() {
#ifdef __AVX512BF16__
  return __builtin_cpu_supports("avx512bf16") != 0;
#else
  return 1;
#endif
}
