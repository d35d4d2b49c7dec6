// Bugs planted in copies of the library's kernels. Each must be noticed by the twin of the variant
// named, over the recorded cases of its operations: in one of the three schedules at least. The
// text to replace stands once in the file.
export const planted = [
  {
    bug: 'linear: the next tiles overwrite those that slower warps still multiply',
    file: 'cuda/gemm_plain.cuh',
    compile: 'cuda/linear.cu',
    search: '    }\n    __syncthreads();\n  }\n\n#pragma unroll\n  for (int r = 0; r < kRows; ++r)',
    replace: '    }\n  }\n\n#pragma unroll\n  for (int r = 0; r < kRows; ++r)',
    cases: /^linear/,
    variant: 'plain',
  },
  {
    bug: 'linear: the column sums start one row of shared memory too far',
    file: 'cuda/linear.cuh',
    compile: 'cuda/linear.cu',
    search: 'sum += sums[d * kAcross + across]',
    replace: 'sum += sums[(d + 1) * kAcross + across]',
    cases: /^linear/,
    variant: 'plain',
  },
  {
    bug: 'layerNormBackward: no barrier before the partial sums are read',
    file: 'cuda/layer_norm.cu',
    search: '  __syncthreads();\n  if (group < 2',
    replace: '  if (group < 2',
    cases: /^layerNorm/,
    variant: 'plain',
  },
  {
    bug: 'meanPool: the barrier stands before the write that it is for',
    file: 'cuda/rows.cu',
    search: '    sums[threadIdx.x] = total + run;\n    __syncthreads();',
    replace: '    __syncthreads();\n    sums[threadIdx.x] = total + run;',
    cases: /^(meanPool|gatherRowsBackward)/,
    variant: 'plain',
  },
  {
    bug: 'sample: the mask of a vote leaves out half of the warp',
    file: 'cuda/sampling.cu',
    search: '__ballot_sync(kAll, rest < below)',
    replace: '__ballot_sync(0xFFFFu, rest < below)',
    cases: /^sample/,
    variant: 'plain',
  },
  {
    bug: 'logProbs: what lies past the end of a row counts as a logit of 0',
    file: 'cuda/log_probs.cu',
    search: 'x[i] = i < n ? to_float(p[i]) : pad;',
    replace: 'x[i] = i < n ? to_float(p[i]) : 0.0f;',
    cases: /^log/,
    variant: 'plain',
  },
  {
    bug: 'gelu: one element too many',
    file: 'cuda/gelu.cu',
    search:
      'kBlock) gelu_kernel(const T* x, T* out, int64_t n, bool tanh) {\n  for (int64_t i = blockIdx.x * int64_t{kBlock} + threadIdx.x; i < n;',
    replace:
      'kBlock) gelu_kernel(const T* x, T* out, int64_t n, bool tanh) {\n  for (int64_t i = blockIdx.x * int64_t{kBlock} + threadIdx.x; i <= n;',
    cases: /^gelu/,
    variant: 'asan',
  },
  {
    bug: 'meanPool: columns past the last are written',
    file: 'cuda/rows.cu',
    search: 'if (group == 0 && column < c)',
    replace: 'if (group == 0)',
    cases: /^(meanPool|gatherRowsBackward)/,
    variant: 'asan',
  },
  {
    bug: 'sample: no barrier before the first warp reads all sums',
    file: 'cuda/sampling.cu',
    search: '  __syncthreads();\n  if (warp) return;',
    replace: '  if (warp) return;',
    cases: /^sample/,
    variant: 'tsan',
  },
  {
    bug: 'attention: no barrier between the weights and their use',
    file: 'cuda/attention.cu',
    search: '      __syncthreads();  // P is there, and K is done with\n',
    replace: '',
    cases: /^attention/,
    variant: 'tsan',
  },
]
