# hqq_compile_options(<target>): warnings, sanitizers, and the floating-point rules that make results
# bit-identical on every instruction set.
function(hqq_compile_options target)
  target_compile_options(${target} PRIVATE
    # A contracted a*b+c rounds once instead of twice: results would depend on the CPU.
    $<$<CXX_COMPILER_ID:GNU,Clang,AppleClang>:-ffp-contract=off>
    $<$<CXX_COMPILER_ID:MSVC>:/fp:precise>
    $<$<CXX_COMPILER_ID:GNU,Clang,AppleClang>:-Wall -Wextra>
    # -Wpsabi warns of ABI changes between compilers, for SIMD types that never leave a file.
    $<$<CXX_COMPILER_ID:GNU>:-Wno-psabi -Wno-ignored-attributes>)
  # SSSE3 and SVE add compile time and no machine that matters; the scalable types of SVE cannot be
  # class members, which the core relies on.
  target_compile_definitions(${target} PRIVATE
    "HWY_DISABLED_TARGETS=(HWY_SSSE3|HWY_SVE|HWY_SVE2|HWY_SVE_256|HWY_SVE2_128)")
  if(HQQ_SANITIZE)
    target_compile_options(${target} PRIVATE -fsanitize=${HQQ_SANITIZE} -fno-omit-frame-pointer
                                             -fno-sanitize-recover=all)
    target_link_options(${target} PUBLIC -fsanitize=${HQQ_SANITIZE})
  endif()
endfunction()
