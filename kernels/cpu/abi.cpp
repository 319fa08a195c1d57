// The version of the functions' signatures, which library.py has to know; 0 where this CPU lacks what the library was built
// for beyond the AVX-512 or AVX2 that its name begins with.

extern "C" int sparse_fcmae_abi() {
#ifdef __AVX512BF16__
  if (!__builtin_cpu_supports("avx512bf16")) return 0;
#endif
  return 2;
}
