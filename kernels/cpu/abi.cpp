// The version of the functions' signatures, so that a library of another version is never called (see constants.py).
// The answer is 0 where this CPU lacks what the library was built for beyond the AVX-512 or AVX2 of its name.

extern "C" int sparse_fcmae_abi() {
#ifdef __AVX512BF16__
  if (!__builtin_cpu_supports("avx512bf16")) return 0;
#endif
  return SPARSE_FCMAE_ABI;
}
