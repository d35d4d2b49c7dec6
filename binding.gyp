# For machines without CMake: a CPU-only addon by node-gyp and make, with the SIMD kernels compiled
# once for each instruction set. CMakeLists.txt is the build that knows CUDA; flags must agree.
{
  'target_defaults': {
    'default_configuration': 'Release',
    'cflags!': ['-fno-exceptions', '-O3'],
    'cflags_cc!': ['-fno-exceptions', '-fno-rtti', '-std=gnu++17', '-std=gnu++20'],
    'cflags_cc': ['-std=c++20', '-fvisibility=hidden', '-O3', '-Wall', '-Wextra'],
    'defines': ['NDEBUG'],
    'include_dirs': ['.'],
  },
  'variables': {
    'simd_sources': [
      "<!@(node -p \"require('fs').readdirSync('cpu/simd').filter(f => f.endsWith('.cpp') && f !== 'select.cpp').map(f => 'cpu/simd/' + f).join(' ')\")"
    ],
    'simd_flags': ['-ffp-contract=fast', '-fno-math-errno', '-fno-trapping-math', '-Wno-psabi',
                   '-Wno-maybe-uninitialized'],
    'sources': [
      "<!@(node -p \"['ops', 'cpu', 'binding'].flatMap(d => require('fs').readdirSync(d, {recursive: true}).map(f => d + '/' + f).filter(f => /\\.(cpp|cc)$/.test(f) && !f.startsWith('cpu/simd/'))).join(' ')\")",
      'cpu/simd/select.cpp',
      'cuda/none.cpp',
    ],
  },
  'targets': [
    {
      'target_name': 'p2r_kernels',
      'sources': ['<@(sources)'],
      'include_dirs': ["<!(node -p \"require('node-addon-api').include_dir\")"],
      'defines': [
        'NAPI_VERSION=9',
        'NODE_ADDON_API_CPP_EXCEPTIONS',
        'NODE_ADDON_API_REQUIRE_BASIC_FINALIZERS',
        'NODE_API_SWALLOW_UNTHROWABLE_EXCEPTIONS',
      ],
      'cflags_cc': ['-ffp-contract=off'],
      'conditions': [
        ['target_arch=="x64"', {'dependencies': ['simd_scalar', 'simd_avx2', 'simd_avx512']}],
        ['target_arch=="arm64"', {'dependencies': ['simd_neon']}],
        ['target_arch!="x64" and target_arch!="arm64"', {'dependencies': ['simd_scalar']}],
      ],
    },
    {
      'target_name': 'simd_scalar',
      'type': 'static_library',
      'sources': ['<@(simd_sources)'],
      'cflags_cc': ['<@(simd_flags)'],
      'defines': ['P2R_ISA=scalar'],
    },
  ],
  'conditions': [
    ['target_arch=="x64"', {
      'targets': [
        {
          'target_name': 'simd_avx2',
          'type': 'static_library',
          'sources': ['<@(simd_sources)'],
          'cflags_cc': ['<@(simd_flags)', '-mavx2', '-mfma', '-mf16c'],
          'defines': ['P2R_ISA=avx2'],
        },
        {
          'target_name': 'simd_avx512',
          'type': 'static_library',
          'sources': ['<@(simd_sources)'],
          'cflags_cc': ['<@(simd_flags)', '-mavx512f', '-mavx512bw', '-mavx512dq', '-mavx512vl',
                        '-mfma', '-mf16c', '-mprefer-vector-width=512'],
          'defines': ['P2R_ISA=avx512'],
        },
      ],
    }],
    ['target_arch=="arm64"', {
      'targets': [
        {
          'target_name': 'simd_neon',
          'type': 'static_library',
          'sources': ['<@(simd_sources)'],
          'cflags_cc': ['<@(simd_flags)'],
          'defines': ['P2R_ISA=neon'],
        },
      ],
    }],
  ],
}
