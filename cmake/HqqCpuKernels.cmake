# hqq_cpu_kernels(<target>): the fused linear kernels, one source file per instruction set, compiled for
# it. Which of them runs is decided at run time (src/cpu/linear/choose.cpp).
function(hqq_cpu_kernels target)
  set(folder ${PROJECT_SOURCE_DIR}/src/cpu/linear/isa)
  set(sources ${folder}/scalar.cpp)
  # More would unroll it to five times the size; nobody runs it for speed.
  set_source_files_properties(${folder}/scalar.cpp PROPERTIES COMPILE_OPTIONS -O2)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
    set(avx2 -mavx2 -mfma -mf16c)
    set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl)
    set(flags_avx2 ${avx2})
    set(flags_avx2_vnni ${avx2} -mavxvnni)
    # GCC 12 warns of its own header.
    set(quiet $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>)
    set(flags_avx512 ${avx512} ${quiet})
    set(flags_avx512_vnni ${avx512} -mavx512vnni ${quiet})
    foreach(isa avx2 avx2_vnni avx512 avx512_vnni)
      list(APPEND sources ${folder}/${isa}.cpp)
      set_source_files_properties(${folder}/${isa}.cpp PROPERTIES COMPILE_OPTIONS
                                  "${flags_${isa}}")
    endforeach()
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64|ARM64")
    list(APPEND sources ${folder}/neon.cpp)
  endif()
  if(HQQ_SANITIZE)
    # Unrolled and inlined, an instrumented file compiles for many minutes.
    set_property(SOURCE ${sources} APPEND PROPERTY COMPILE_DEFINITIONS HQQ_SMALL_CODE)
    if(HQQ_SANITIZE MATCHES "fuzzer")
      # Inputs decide nothing in here, and half of the time would go into it; addresses are checked.
      set_property(SOURCE ${sources} APPEND PROPERTY COMPILE_OPTIONS
                   -fno-sanitize=undefined,fuzzer-no-link)
    endif()
  endif()
  target_sources(${target} PRIVATE ${sources})
endfunction()
