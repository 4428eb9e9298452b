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

# hqq_unity(<target>): with HQQ_UNITY its files are compiled several at a time, which parses nlohmann/json,
# pybind11 and CLI11 once for all of them. Kernels stay alone: they are compiled once for each instruction
# set, and what is inlined into them must not depend on their neighbours.
function(hqq_unity target)
  get_target_property(sources ${target} SOURCES)
  list(FILTER sources INCLUDE REGEX "src/cpu/")
  set_source_files_properties(${sources} PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
  set_target_properties(${target} PROPERTIES UNITY_BUILD ${HQQ_UNITY} UNITY_BUILD_BATCH_SIZE 12)
endfunction()
