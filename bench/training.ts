// What a prompt that is computed once for its completions saves in training: a pass forward and backward, with and
// without it, in time and in bytes. The model is a share of the 2B model, by whole layers: with all of its vocabulary
// the head would take most of the time, as it does not in the model.
import { rmSync } from 'node:fs'
import { join } from 'node:path'
import { openDevice, Qwen3VL } from 'p2r-kernels'
import { integers } from './data.js'
import { sliceOf, writeCheckpoint } from './qwen3_vl.js'
import { quantiles } from './statistics.js'
import { aligned } from './table.js'

export interface Group {
  /** Tokens of the prompt. */
  prompt: number
  completions: number
  /** Tokens of each. */
  length: number
}

export const group: Group = { prompt: 1000, completions: 8, length: 100 }
/** Of the language model. */
export const trainedLayers = 2

export interface Pass {
  work: 'prompt once' | 'prompt in each'
  /** That go forward. */
  tokens: number
  /** Milliseconds: the median of the samples. */
  ms: number
  /** The most that a pass held beside the model. */
  peakBytes: number
}

/** The arguments of `Qwen3VL.record`, with the prompt once or before each completion. */
export function packed({ prompt, completions, length }: Group, once: boolean) {
  const shown = integers(prompt, 10_000, 0)
  const tokens: number[] = []
  const cuSeqlens = [0]
  const targets: number[] = []
  if (once) cuSeqlens.push(tokens.push(...shown))
  for (let i = 0; i < completions; i++) {
    if (!once) tokens.push(...shown)
    for (const token of integers(length, 10_000, i + 1)) targets.push(tokens.push(token) - 1)
    cuSeqlens.push(tokens.length)
  }
  const prefixOf = cuSeqlens.slice(1).map((_, i) => (once && i > 0 ? 0 : -1))
  return { tokens, cuSeqlens, targets, prefixOf }
}

/** Measures on a CPU device with the default number of threads. */
export async function trainingPasses(
  root: string,
  progress: (what: string) => void,
  rounds = 3,
): Promise<{ threads: number; passes: Pass[] }> {
  const folder = join(root, 'build/bench/training')
  using device = openDevice('cpu')
  const { threads = 1 } = device.info
  try {
    progress('writing random weights')
    await writeCheckpoint(folder, sliceOf(trainedLayers))
    using model = await Qwen3VL.load(folder, device, { cacheTokens: 256 })
    const passes: Pass[] = []
    for (const work of ['prompt once', 'prompt in each'] as const) {
      const rows = packed(group, work === 'prompt once')
      const count = rows.targets.length
      using dLogProbs = device.tensor(new Float32Array(count).fill(-1 / count), [count])
      // The tower is as without images: nothing is computed in it.
      const trainable = (name: string): boolean => !name.startsWith('model.visual.')
      const samples: number[] = []
      let peakBytes = 0
      for (let round = 0; round <= rounds; round++) {
        progress(`${work}, ${round} of ${rounds}`)
        await device.synchronize()
        device.resetPeak()
        const { liveBytes } = device.memory()
        const start = performance.now()
        const made = model.backward({ ...rows, dLogProbs, trainable })
        await device.synchronize()
        // The first one touches new memory.
        if (round > 0) samples.push(performance.now() - start)
        peakBytes = device.memory().peakBytes - liveBytes
        made.dispose()
      }
      const { median: ms } = quantiles(samples)
      passes.push({ work, tokens: rows.tokens.length, ms, peakBytes })
    }
    return { threads, passes }
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
}

export function trainingReport(passes: readonly Pass[], threads: number): string {
  const most = Math.max(...passes.map(({ ms }) => ms))
  const { prompt, completions, length } = group
  const table = [
    ['', 'tokens', 'seconds', 'times faster', 'peak GiB'],
    ...passes.map(({ work, tokens, ms, peakBytes }) => [
      work,
      String(tokens),
      (ms / 1e3).toFixed(2),
      (most / ms).toFixed(2),
      (peakBytes / 2 ** 30).toFixed(2),
    ]),
  ]
  const title = `${trainedLayers} of Qwen3-VL-2B's 28 layers and as much of its vocabulary, bf16, ${threads} threads: forward and backward of a prompt of ${prompt} and ${completions} completions of ${length}`
  return [title, aligned(table, 1)].join('\n')
}
