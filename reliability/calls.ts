// A valid call of every exported function, constructor and method, on random small inputs. What the library exports
// and this list leaves out is an error of types.
import { join } from 'node:path'
import * as library from 'p2r-kernels'
import type { Gen } from './gen.js'

type Library = typeof library
type Callable = (...a: never[]) => unknown
export type FunctionName = {
  [K in keyof Library]: Library[K] extends Callable ? K : never
}[keyof Library]
export type ClassName = {
  [K in keyof Library]: Library[K] extends Callable
    ? never
    : Library[K] extends { prototype: object }
      ? K
      : never
}[keyof Library]

/** A call's arguments. Their types are checked by the library, at run time: that is what is tried. */
export type Arguments = readonly unknown[]

const policy = library.functionPolicy(({ role }) =>
  role === 'perceiver'
    ? {
        text: '[{"bbox_2d": [10, 10, 600, 700], "label": "a"}]',
        tokens: [1, 2],
        logProbs: [-1, -1],
      }
    : { text: '<answer>B</answer>', tokens: [3], logProbs: [-0.5] },
)

const box = (g: Gen) => {
  const [x, y] = [g.int(0, 500), g.int(0, 500)]
  return { bbox2d: [x, y, x + g.int(1, 499), y + g.int(1, 499)], label: 'a' }
}
const boxes = (g: Gen) => Array.from({ length: g.int(0, 3) }, () => box(g))
const pixelBox = (g: Gen, height: number, width: number) => {
  const [x, y] = [g.int(0, width - 2), g.int(0, height - 2)]
  return [x, y, g.int(x + 1, width), g.int(y + 1, height)]
}
const image = (g: Gen) => g.u8([g.int(28, 60), g.int(28, 60), 3])
const question = { question: 'Which? (A) one (B) two', answerForm: 'mca' }
const grid = (g: Gen) => [g.int(1, 2), 2 * g.int(1, 3), 2 * g.int(1, 3)] as const
const overlay = (g: Gen, height: number, width: number) => ({
  boxes: [pixelBox(g, height, width)],
  colors: g.maybe([[255, 0, 0]]),
  width: g.int(1, 3),
})

/** Heads of a random size; the keys' are as many as the queries', or divide them. */
function heads(g: Gen, grouped = true) {
  const { cuSeqlens, rows } = g.packed()
  const dtype = g.float()
  const D = 8 * g.int(1, 4)
  const kv = g.int(1, 2)
  const H = grouped ? kv * g.int(1, 2) : kv
  const causal = g.maybe(true)
  return {
    q: g.tensor([rows, H, D], dtype),
    k: g.tensor([rows, causal && grouped ? kv : H, D], dtype),
    v: g.tensor([rows, causal && grouped ? kv : H, D], dtype),
    cuSeqlens,
    scale: g.maybe(0.3),
    causal,
  }
}
function packedHeads(g: Gen) {
  const { cuSeqlens, rows } = g.packed()
  return { qkv: g.tensor([rows, 3, g.int(1, 2), 8 * g.int(1, 3)], g.float()), cuSeqlens }
}
function attended(g: Gen) {
  const a = heads(g)
  const { out, lse } = library.attention(a as never) as { out: library.Tensor; lse: library.Tensor }
  return { ...a, out, lse, dOut: g.tensor(out.shape, out.dtype) }
}

function logits(g: Gen, vocabulary = g.int(1, 40)) {
  const rows = g.int(0, 6)
  return {
    logits: g.tensor([rows, vocabulary], g.float()),
    targets: g.i32([rows], vocabulary),
    temperature: g.maybe(0.5 + g.uniform()),
  }
}
function head(g: Gen) {
  const [rows, width, vocabulary] = [g.int(0, 6), g.int(1, 20), g.int(1, 40)]
  const dtype = g.float()
  return {
    hidden: g.tensor([rows, width], dtype),
    weight: g.tensor([vocabulary, width], dtype),
    targets: g.i32([rows], vocabulary),
    temperature: g.maybe(0.7),
  }
}
const lossOptions = (g: Gen) => ({
  objective: g.maybe(
    g.pick([
      'ppo',
      'gspo',
      'cispo',
      'sapo',
      'gmpo',
      'vespo',
      'luspo',
      'dppo_tv',
      'dppo_kl',
      'clip_cov',
      'kl_cov',
    ]),
  ),
  aggregation: g.maybe(g.pick(['token-mean', 'seq-mean-token-mean', 'seq-mean-token-sum'])),
  klCoef: g.maybe(0.01),
})
function loss(g: Gen) {
  const { cuSeqlens, sequences, rows } = g.packed()
  return {
    logProbs: g.f32([rows]),
    oldLogProbs: g.f32([rows]),
    refLogProbs: g.f32([rows]),
    advantages: g.f32([sequences]),
    mask: g.maybe(g.u8([rows], 2)),
    cuSeqlens,
    ...lossOptions(g),
  }
}
function headLoss(g: Gen) {
  const { cuSeqlens, sequences, rows } = g.packed()
  const [width, vocabulary] = [g.int(1, 20), g.int(2, 40)]
  return {
    hidden: g.f32([rows, width]),
    weight: g.f32([vocabulary, width]),
    targets: g.i32([rows], vocabulary),
    oldLogProbs: g.f32([rows]),
    advantages: g.f32([sequences]),
    cuSeqlens,
  }
}
function grouped(g: Gen) {
  const [groups, size] = [g.int(0, 3), g.int(1, 4)]
  return {
    rewards: g.f32([groups * size]),
    groups: g.ints(Array.from({ length: groups * size }, (_, i) => Math.floor(i / size))),
  }
}
function distilled(g: Gen) {
  const [rows, vocabulary] = [g.int(0, 5), g.int(1, 30)]
  const dtype = g.float()
  return {
    logits: g.tensor([rows, vocabulary], dtype),
    teacherLogits: g.tensor([rows, vocabulary], dtype),
    objective: g.maybe(g.pick(['reverse_kl', 'forward_kl'])),
    mask: g.maybe(g.u8([rows], 2)),
  }
}
function distilledHeads(g: Gen) {
  const [rows, width, vocabulary] = [g.int(0, 5), g.int(1, 12), g.int(1, 30)]
  return {
    hidden: g.f32([rows, width]),
    weight: g.f32([vocabulary, width]),
    teacherHidden: g.f32([rows, width]),
    teacherWeight: g.f32([vocabulary, width]),
  }
}
const matrix = (g: Gen) => {
  const dtype = g.float()
  const [rows, width] = [g.int(0, 5), 8 * g.int(1, 4)]
  return { dtype, rows, width, x: g.tensor([rows, width], dtype) }
}
function tokens(g: Gen) {
  const { cuSeqlens, rows } = g.packed()
  return { tokens: g.ints(g.list(rows, 0, 9)), cuSeqlens }
}
const ropeConfig = { imageToken: 90, videoToken: 91, visionStartToken: 92, mergeSize: 2 }
const path = (g: Gen, name: string) => join(g.folder, name)

/** For each exported function the arguments of a call that it accepts. */
export const functions: Readonly<Record<FunctionName, (g: Gen) => Arguments>> = {
  adamW(g) {
    const shape = [g.int(0, 20)]
    const dtype = g.float()
    return [
      {
        params: [g.tensor(shape, dtype)],
        grads: [g.tensor(shape, dtype)],
        moments: [g.device.zeros([2, ...shape])],
        step: g.int(1, 5),
        lr: 0.01,
        weightDecay: g.maybe(0.1),
      },
    ]
  },
  add: (g) => {
    const { x, width, dtype } = matrix(g)
    return [{ x, y: g.tensor(g.pick([[width], x.shape]), dtype) }]
  },
  alternatingSettings: (g) => [{ steps: g.int(1, 5) }],
  answer: (g) => [
    {
      perceiver: new library.Perceiver(policy),
      reasoner: new library.Reasoner(policy),
      image: image(g),
      ...question,
    },
  ],
  answerReward: (g) => [
    { answer: g.pick(['A', '(B)', '12']), truth: 'B', form: g.pick(['mca', 'na']) },
  ],
  applyKlPenalty: (g) => {
    const { logProbs, refLogProbs, cuSeqlens } = loss(g)
    return [
      { rewards: g.f32([cuSeqlens.length - 1]), logProbs, refLogProbs, cuSeqlens, klCoef: 0.1 },
    ]
  },
  applyRotary: (g) => {
    const [rows, D] = [g.int(0, 5), 8 * g.int(1, 3)]
    const tables = { cos: g.f32([rows, D]), sin: g.f32([rows, D]) }
    return [{ x: g.tensor([rows, g.int(1, 3), D], g.float()), ...tables, inverse: g.maybe(true) }]
  },
  attention: (g) => [g.pick([heads, packedHeads])(g)],
  attentionBackward: (g) => [attended(g)],
  attentionMass: (g) => {
    const { q, k, cuSeqlens, scale } = { ...heads(g, false), scale: 0.3 }
    const { lse } = library.attention({ q, k, v: k, cuSeqlens, scale } as never) as { lse: unknown }
    return [{ q, k, cuSeqlens, scale, lse }]
  },
  boxIoU: (g) => [box(g).bbox2d, box(g).bbox2d],
  cachedAttention(g) {
    const { q, k, v, cuSeqlens, sequences } = (() => {
      const { cuSeqlens, sequences, rows } = g.packed()
      const make = (count: number) => g.tensor([rows, count, 8], 'f32')
      return { q: make(2), k: make(1), v: make(1), cuSeqlens, sequences }
    })()
    const cache = new library.KvCache(g.device, {
      layers: 1,
      kvHeads: 1,
      headDim: 8,
      pages: 8,
      dtype: 'f32',
    })
    const ids = Array.from({ length: sequences }, () => cache.add())
    return [{ q, k, v, cuSeqlens, cache, layer: 0, sequences: ids }]
  },
  clipGradNorm: (g) => [
    { grads: [g.f32([g.int(0, 20)]), g.tensor([3, 2], g.float())], maxNorm: 1 },
  ],
  collectEvidence: (g) => [{ image: image(g), boxes: boxes(g), maxPixels: g.maybe(8192) }],
  concat: (g) => {
    const dtype = g.pick(['f32', 'u8', 'i32', 'bf16'] as const)
    return [{ tensors: [g.tensor([2, 3], dtype), g.tensor([g.int(0, 3), 3], dtype)], axis: 0 }]
  },
  cropResample: (g) => [
    {
      image: g.u8([20, 30, 3]),
      regions: [{ box: pixelBox(g, 20, 30), height: g.int(1, 20), width: g.int(1, 20) }],
      filter: g.maybe(g.pick(['box', 'bilinear', 'bicubic', 'lanczos'])),
    },
  ],
  cudaStatus: () => [],
  devices: () => [],
  distillation: (g) => [distilled(g)],
  distillationAdvantages: (g) => {
    const { logProbs, refLogProbs: teacherLogProbs, cuSeqlens } = loss(g)
    return [{ logProbs, teacherLogProbs, cuSeqlens }]
  },
  distillationBackward: (g) => {
    const a = distilled(g)
    return [{ ...a, dDivergence: g.f32([a.logits.shape[0]!]) }]
  },
  drawBoxes: (g) => [{ image: g.u8([20, 30, 3]), ...overlay(g, 20, 30) }],
  encodeImage: (g) => [image(g), { format: g.pick(['png', 'jpeg', 'webp']) }],
  evaluate: (g) => [
    {
      perceiver: new library.Perceiver(policy),
      reasoner: new library.Reasoner(policy),
      questions: [{ image: image(g), ...question, truth: 'B' }],
    },
  ],
  extractAnswer: () => ['<answer>B</answer>'],
  formatReward: (g) => ['<think>a</think><answer>B</answer>', g.pick(['perceiver', 'reasoner'])],
  functionPolicy: () => [() => 'text'],
  gatherRows: (g) => {
    const rows = g.int(1, 6)
    return [
      {
        x: g.tensor([rows, 3], g.pick(['f32', 'u8', 'bf16'])),
        index: g.ints(g.list(g.int(0, 5), 0, rows - 1)),
      },
    ]
  },
  gatherRowsBackward: (g) => {
    const count = g.int(0, 5)
    return [{ dOut: g.tensor([count, 3], g.float()), index: g.ints(g.list(count, 0, 3)), rows: 4 }]
  },
  gelu: (g) => [{ x: g.tensor([g.int(0, 40)], g.float()), approximate: g.maybe('tanh') }],
  geluBackward: (g) => {
    const { x, dtype } = matrix(g)
    return [{ x, dOut: g.tensor(x.shape, dtype) }]
  },
  groundingRewards: (g) => [
    {
      text: '[{"bbox_2d": [0, 0, 9, 9], "label": "a"}]',
      truth: boxes(g).map(({ bbox2d }) => bbox2d),
    },
  ],
  groupAdvantages: (g) => [
    { ...grouped(g), estimator: g.maybe(g.pick(['grpo', 'dr_grpo', 'rloo', 'maxrl'])) },
  ],
  grpoStep: (g) => {
    const { logProbs, cuSeqlens } = loss(g)
    const rewards = g.f32([cuSeqlens.length - 1])
    return [{ logProbs, rewards, groups: Array.from({ length: rewards.size }, () => 0), cuSeqlens }]
  },
  informativeGroups: (g) => [grouped(g)],
  kernels: (g) => ['attention', g.device],
  layerNorm: (g) => {
    const { x, width, dtype } = matrix(g)
    return [{ x, weight: g.tensor([width], dtype), bias: g.tensor([width], dtype) }]
  },
  layerNormBackward: (g) => {
    const { x, width, dtype } = matrix(g)
    const weight = g.tensor([width], dtype)
    const { stats } = library.layerNorm({ x, weight, bias: weight } as never) as { stats: unknown }
    return [{ dOut: g.tensor(x.shape, dtype), x, weight, stats }]
  },
  linear: (g) => {
    const { x, width, dtype } = matrix(g)
    const rows = g.int(0, 20)
    return [{ x, weight: g.tensor([rows, width], dtype), bias: g.maybe(g.tensor([rows], dtype)) }]
  },
  linearBackward: (g) => {
    const { x, rows, width, dtype } = matrix(g)
    const outputs = g.int(0, 20)
    return [
      { dOut: g.tensor([rows, outputs], dtype), x, weight: g.tensor([outputs, width], dtype) },
    ]
  },
  linearDistillation: (g) => [distilledHeads(g)],
  linearDistillationBackward: (g) => {
    const a = distilledHeads(g)
    return [{ ...a, dDivergence: g.f32([a.hidden.shape[0]!]) }]
  },
  linearLogProbs: (g) => [{ ...head(g), entropy: g.maybe(true) }],
  linearLogProbsBackward: (g) => {
    const a = head(g)
    const { stats } = library.linearLogProbs(a as never) as { stats: unknown }
    return [{ ...a, stats, dLogProbs: g.f32([a.targets.size]) }]
  },
  linearPolicyLoss: (g) => [headLoss(g)],
  loadImage: (g) => [Buffer.from(tinyPng), g.device],
  loadMetadata: (g) => [path(g, 'tensors.safetensors')],
  loadRollouts: (g) => [path(g, 'rollouts'), g.device],
  loadTensors: (g) => [path(g, 'tensors.safetensors'), g.device],
  matchedIoU: (g) => [boxes(g).map(({ bbox2d }) => bbox2d), boxes(g).map(({ bbox2d }) => bbox2d)],
  mean: (g) => [{ x: matrix(g).x, axes: g.maybe([1]) }],
  meanPool: (g) => {
    const { cuSeqlens, rows } = g.packed()
    return [{ x: g.tensor([rows, 5], g.float()), cuSeqlens }]
  },
  meanPoolBackward: (g) => {
    const { cuSeqlens, sequences } = g.packed()
    return [{ dOut: g.tensor([sequences, 5], g.float()), cuSeqlens }]
  },
  mergeLogProbs: (g) => {
    const a = logits(g, 12)
    const shard = { logits: a.logits, targets: a.targets, vocabOffset: 0 }
    return [[library.tokenLogProbsShard(shard as never)]]
  },
  modelVerifier: (g) => [policy, { maxTokens: g.int(1, 9) }],
  mropeTables: (g) => [
    {
      positions: g.ints(g.list(3 * g.int(0, 5), 0, 99)),
      headDim: 16,
      theta: 1e4,
      sections: g.maybe([3, 3, 2]),
      device: g.device,
    },
  ],
  mul: (g) => {
    const { x, width, dtype } = matrix(g)
    return [{ x, y: g.tensor([width], dtype) }]
  },
  normalizePatches: (g) => [
    { patches: g.u8([g.int(0, 4), 3 * 2 * 8 * 8]), dtype: g.maybe('bf16') },
  ],
  openDevice: (g) => ['cpu', { threads: g.int(1, 3), maxQueuedBytes: 2 ** 20, whenFull: 'throw' }],
  overlongPenalty: (g) => [{ length: g.int(0, 30), maxTokens: 20, buffer: 5 }],
  paperSettings: (g) => [{ samples: g.int(1, 99), batch: g.int(1, 9) }],
  parseBoxes: () => ['[{"bbox_2d": [1, 2, 3, 4], "label": "a"}]'],
  perceivePrompt: () => [{ question: 'Which?' }],
  perceptionFault: (g) => [boxes(g)],
  pixelValues: (g) => {
    const picture = g.u8([40, 60, 3])
    const size = () => 16 * g.int(1, 3)
    return [
      {
        image: picture,
        regions: [{ box: pixelBox(g, 40, 60), height: size(), width: size() }],
        overlay: g.maybe(overlay(g, 40, 60)),
        patchSize: 8,
        dtype: g.maybe(g.pick(['f32', 'bf16', 'u8'])),
      },
    ]
  },
  pointInBoxes: (g) => [[g.int(0, 999), g.int(0, 999)], boxes(g).map(({ bbox2d }) => bbox2d)],
  policyLoss: (g) => [loss(g)],
  quantize: (g) => [
    {
      weight: g.tensor([g.int(0, 5), g.int(1, 70)], g.float()),
      bits: g.pick([4, 8]),
      group: g.maybe(32),
    },
  ],
  reasonPrompt: () => [{ ...question, hasEvidence: true }],
  recordPolicy: (g) => [policy, path(g, `recorded-${g.int(0, 9)}.jsonl`)],
  reproductionSettings: () => [],
  rmsNorm: (g) => {
    const { x, width, dtype } = matrix(g)
    return [{ x, weight: g.tensor([width], dtype), residual: g.maybe(g.tensor(x.shape, dtype)) }]
  },
  rmsNormBackward: (g) => {
    const { x, width, dtype } = matrix(g)
    const weight = g.tensor([width], dtype)
    const { rstd } = library.rmsNorm({ x, weight } as never) as { rstd: unknown }
    return [{ dOut: g.tensor(x.shape, dtype), x, weight, rstd }]
  },
  rolloutCorrection: (g) => {
    const { logProbs, oldLogProbs: rolloutLogProbs, cuSeqlens, mask } = loss(g)
    return [
      {
        logProbs,
        rolloutLogProbs,
        cuSeqlens,
        mask,
        level: g.maybe(g.pick(['token', 'sequence', 'geometric'])),
      },
    ]
  },
  ropeIndex: (g) => [{ ...tokens(g), config: ropeConfig }],
  sample: (g) => [{ logits: logits(g).logits, seed: g.int(0, 99), temperature: g.maybe(0.7) }],
  sampleTokens: (g) => {
    const { logits: given } = logits(g)
    const rows = given.shape[0]!
    return [
      {
        logits: given,
        seeds: g.ints(g.list(rows, 0, 99)),
        topK: g.maybe(3),
        topP: g.maybe(0.9),
        minP: g.maybe(0.1),
      },
    ]
  },
  saveImage: (g) => [image(g), path(g, `image-${g.int(0, 9)}.png`)],
  saveRollouts: (g) => [path(g, `rollouts-${g.int(0, 9)}`), undefined],
  saveTensors: (g) => [
    path(g, `saved-${g.int(0, 9)}.safetensors`),
    { a: g.f32([2, 3]), b: g.u8([4]) },
  ],
  scatterAddRows: (g) => {
    const [count, dtype] = [g.int(0, 4), g.float()]
    return [
      {
        x: g.tensor([5, 3], dtype),
        y: g.tensor([count, 3], dtype),
        index: g.ints(g.list(count, 0, 4)),
      },
    ]
  },
  scatterRows: (g) => {
    const dtype = g.pick(['f32', 'u8', 'bf16'] as const)
    return [
      {
        x: g.tensor([5, 3], dtype),
        y: g.tensor([2, 3], dtype),
        index: g.ints([g.int(0, 1), g.int(2, 4)]),
      },
    ]
  },
  scatterRowsBackward: (g) => [{ dOut: g.tensor([5, 3], g.float()), index: g.ints([0, 3]) }],
  scope: (g) => [() => g.f32([3])],
  scopeAsync: (g) => [async () => g.f32([3]), { signal: new AbortController().signal }],
  serveModel: () => [undefined],
  smartResize: (g) => [g.int(50, 5000), g.int(50, 5000), { factor: g.maybe(28) }],
  split: (g) => [{ x: g.tensor([5, 3], g.pick(['f32', 'u8'])), sizes: g.ints([2, 3]) }],
  sum: (g) => [{ x: matrix(g).x, axes: g.maybe([0]), keepDims: g.maybe(true) }],
  swiglu: (g) => {
    const { x, dtype } = matrix(g)
    return [g.pick([{ gate: x, up: g.tensor(x.shape, dtype) }, { gateUp: x }])]
  },
  swigluBackward: (g) => {
    const { x, dtype } = matrix(g)
    return [{ gate: x, up: g.tensor(x.shape, dtype), dOut: g.tensor(x.shape, dtype) }]
  },
  tokenLogProbs: (g) => [{ ...logits(g), entropy: g.maybe(true) }],
  tokenLogProbsBackward: (g) => {
    const a = logits(g)
    const { stats } = library.tokenLogProbs(a as never) as { stats: unknown }
    return [{ ...a, stats, dLogProbs: g.f32([a.targets.size]), inPlace: g.maybe(true) }]
  },
  tokenLogProbsShard: (g) => [{ ...logits(g, 12), vocabOffset: g.int(0, 3) }],
  transpose: (g) => [
    { x: g.tensor([g.int(0, 5), g.int(0, 5), 2], g.pick(['f32', 'u8'])), axes: g.maybe([0, 1]) },
  ],
  unionIoU: (g) => [boxes(g).map(({ bbox2d }) => bbox2d), boxes(g).map(({ bbox2d }) => bbox2d)],
  visionPositions: (g) => [
    { table: g.tensor([16, 3], g.float()), gridThw: [grid(g)], mergeSize: 2 },
  ],
  visionRotary: (g) => [{ gridThw: [grid(g)], headDim: 8, device: g.device }],
  windowLayout: (g) => [{ gridThw: [grid(g)], window: g.int(1, 4) }],
  zoomPrompt: () => [question],
  zoomTool: (g) => [g.pick(['thousandths', 'absolute'])],
}

/** A PNG of one grey pixel. */
const tinyPng = Buffer.from(
  'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg==',
  'base64',
)

/** An instance, and the arguments of calls of its methods that they accept. */
export interface Instance {
  of: object
  methods: Readonly<Record<string, () => Arguments>>
}

/** For each exported class the arguments of its constructor, and an instance; classes that are only made by functions have those. */
export const classes: Readonly<
  Record<
    ClassName | 'Tensor',
    { construct?: (g: Gen) => Arguments; instance?: (g: Gen) => Instance }
  >
> = {
  Device: {
    instance: (g) => ({
      of: g.device,
      methods: {
        tensor: () => [Float32Array.from({ length: 6 }), [2, 3], g.maybe('bf16')],
        zeros: () => [[g.int(0, 5), 3], g.maybe('u8')],
        fromIpcHandle: () => [
          {
            backend: 'cpu',
            name: g.maybe('/proc/self/fd/0') ?? '/p2r-none',
            bytes: 4,
            offset: 0,
            dtype: 'f32',
            shape: [1],
            pid: 1,
          },
          { anyFile: false },
        ],
        synchronize: () => [],
        time: () => [() => library.gelu({ x: g.f32([5]) })],
        memory: () => [],
        resetPeak: () => [],
        toString: () => [],
      },
    }),
  },
  Tensor: {
    instance: (g) => {
      const of = g.tensor([4, 6], g.pick(['f32', 'bf16', 'u8', 'i32']))
      return {
        of,
        methods: {
          read: () => [],
          toFloat32: () => [],
          reshape: () => [[6, 4]],
          slice: () => [g.int(0, 2), g.int(2, 4)],
          cast: () => [g.pick(['f32', 'f16', 'u8'])],
          to: () => [g.device],
          copyFrom: () => [g.tensor([4, 6], of.dtype)],
          toString: () => [],
        },
      }
    },
  },
  KvCache: {
    construct: (g) => [g.device, { layers: 1, kvHeads: 1, headDim: 8, pages: g.int(1, 4) }],
    instance: (g) => {
      const of = new library.KvCache(g.device, { layers: 1, kvHeads: 1, headDim: 8, pages: 4 })
      const sequence = of.add()
      return {
        of,
        methods: {
          add: () => [g.maybe(sequence)],
          length: () => [sequence],
          truncate: () => [sequence, 0],
          remove: () => [sequence],
          pagesNeeded: () => [sequence, 3],
        },
      }
    },
  },
  LocalPolicy: { construct: () => [undefined] },
  OpenAIPolicy: {
    construct: () => [{ baseURL: 'http://127.0.0.1:9/v1', model: 'm', maxRetries: 0 }],
  },
  P2RError: {},
  Perceiver: {
    construct: (g) => [policy, { maxTokens: g.int(1, 9) }],
    instance: (g) => ({
      of: new library.Perceiver(policy),
      methods: { perceive: () => [{ image: image(g), question: 'Which?', n: g.int(1, 3) }] },
    }),
  },
  PraGrpo: {
    construct: (g) => [{ perceiver: policy, reasoner: policy, device: g.device, groupSize: 2 }],
    instance: (g) => ({
      of: new library.PraGrpo({
        perceiver: policy,
        reasoner: policy,
        device: g.device,
        groupSize: 2,
      }),
      methods: {
        rollout: () => [[{ image: image(g), ...question, truth: 'B' }]],
        metrics: () => [],
      },
    }),
  },
  LocalTrainer: {},
  Qwen3VL: {},
  Qwen3VLRecord: {},
  Qwen3VLTokenizer: {},
  Reasoner: {
    construct: (g) => [policy, { maxTokens: g.int(1, 9) }],
    instance: (g) => ({
      of: new library.Reasoner(policy),
      methods: {
        reason: () => [
          {
            ...question,
            evidence: library.collectEvidence({ image: image(g), boxes: boxes(g) } as never),
          },
        ],
      },
    }),
  },
  RecordedPolicy: {},
  VisionRecord: {},
  VisionTower: {},
  ZoomAgent: {
    construct: () => [policy, { maxTurns: 2 }],
    instance: (g) => ({
      of: new library.ZoomAgent(policy),
      methods: { zoom: () => [{ image: image(g), ...question }] },
    }),
  },
}
