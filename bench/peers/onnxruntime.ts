// onnxruntime-node on models of a few nodes. Its threads stop spinning when a run ends, since
// they would otherwise take a core from the implementation that is measured next.
import { type Peer, PeerAbsent } from '../harness.js'
import { peerModule } from './install.js'
import { type Node, onnxModel, type Value } from './onnx.js'

interface OrtTensor {
  readonly data: ArrayLike<number>
}
/** The part of onnxruntime-node that is used here. */
interface Ort {
  Tensor: new (type: string, data: unknown, dims: readonly number[]) => OrtTensor
  InferenceSession: {
    create(model: Uint8Array, options: object): Promise<Session>
  }
}
interface Session {
  run(
    feeds: Record<string, OrtTensor>,
    fetches: Record<string, OrtTensor>,
  ): Promise<Record<string, OrtTensor>>
  release(): Promise<void>
}

let loaded: Ort | Error | undefined

function ort(): Ort {
  if (loaded === undefined)
    try {
      loaded = peerModule('onnxruntime-node') as Ort
    } catch (error) {
      loaded = error as Error
    }
  if (loaded instanceof Error)
    throw new PeerAbsent(
      'onnxruntime-node is not here (its CPU library comes with the npm package), so it was skipped.',
    )
  return loaded
}

function onnxruntime(
  name: string,
  tolerance: number,
  model: { nodes: readonly Node[]; inputs: readonly Value[]; outputs: readonly Value[] },
  feeds: Record<string, Float32Array | BigInt64Array>,
): Peer {
  return {
    name,
    tolerance,
    async open(threads) {
      const { InferenceSession, Tensor } = ort()
      const session = await InferenceSession.create(onnxModel(model), {
        executionProviders: ['cpu'],
        graphOptimizationLevel: 'all',
        intraOpNumThreads: threads,
        interOpNumThreads: 1,
        logSeverityLevel: 3,
        extra: { session: { force_spinning_stop: '1' } },
      })
      const tensors: Record<string, OrtTensor> = {}
      for (const { name, type, shape } of model.inputs)
        tensors[name] = new Tensor(type === 'float' ? 'float32' : type, feeds[name], shape)
      // A preallocated output: allocating one per run would measure page faults.
      const { name: output, shape } = model.outputs[0]!
      const size = shape.reduce((n, d) => n * d, 1)
      const out = { [output]: new Tensor('float32', new Float32Array(size), shape) }
      return {
        run: async () => (await session.run(tensors, out))[output]!.data,
        close: () => void session.release(),
      }
    },
  }
}

/**
 * softmax(q kᵀ / sqrt(D)) v over sequences of one length, tokens as [batch, length, heads, D]: by
 * the operator of onnxruntime's own domain and by that of ONNX.
 */
export function attentions(
  shape: { batch: number; length: number; heads: number; headDim: number },
  q: Float32Array,
  k: Float32Array,
  v: Float32Array,
): Peer[] {
  const dims = [shape.batch, shape.length, shape.heads * shape.headDim]
  const { heads } = shape
  const operators = [
    { op: 'MultiHeadAttention', domain: 'com.microsoft', ints: { num_heads: heads } },
    { op: 'Attention', ints: { q_num_heads: heads, kv_num_heads: heads } },
  ]
  return operators.map((operator) =>
    onnxruntime(
      `onnxruntime ${operator.op}`,
      1e-4,
      {
        nodes: [{ ...operator, inputs: ['q', 'k', 'v'], outputs: ['out'] }],
        inputs: ['q', 'k', 'v'].map((name) => float(name, dims)),
        outputs: [float('out', dims)],
      },
      { q, k, v },
    ),
  )
}

/** log softmax at the targets. */
export function logSoftmaxGather(logits: Float32Array, targets: Int32Array): Peer {
  const [rows, shape] = rowsOf(logits, targets)
  return onnxruntime(
    'onnxruntime LogSoftmax',
    1e-5,
    {
      nodes: [
        { op: 'LogSoftmax', inputs: ['logits'], outputs: ['all'], ints: { axis: -1 } },
        {
          op: 'GatherElements',
          inputs: ['all', 'targets'],
          outputs: ['out'],
          ints: { axis: 1 },
        },
      ],
      inputs: [float('logits', shape), int64('targets', [rows, 1])],
      outputs: [float('out', [rows, 1])],
    },
    { logits, targets: BigInt64Array.from(targets, BigInt) },
  )
}

/** The gradient of the sum of the targets' log-probabilities: one-hot minus softmax. */
export function softmaxScatter(logits: Float32Array, targets: Int32Array): Peer {
  const [rows, shape] = rowsOf(logits, targets)
  return onnxruntime(
    'onnxruntime Softmax, Scatter',
    1e-5,
    {
      nodes: [
        { op: 'Softmax', inputs: ['logits'], outputs: ['p'], ints: { axis: -1 } },
        { op: 'Neg', inputs: ['p'], outputs: ['minus'] },
        {
          op: 'ScatterElements',
          inputs: ['minus', 'targets', 'ones'],
          outputs: ['out'],
          ints: { axis: 1 },
          strings: { reduction: 'add' },
        },
      ],
      inputs: [float('logits', shape), int64('targets', [rows, 1]), float('ones', [rows, 1])],
      outputs: [float('out', shape)],
    },
    {
      logits,
      targets: BigInt64Array.from(targets, BigInt),
      ones: new Float32Array(rows).fill(1),
    },
  )
}

const float = (name: string, shape: number[]): Value => ({ name, type: 'float', shape })
const int64 = (name: string, shape: number[]): Value => ({ name, type: 'int64', shape })

function rowsOf(logits: Float32Array, targets: Int32Array): [number, [number, number]] {
  const rows = targets.length
  return [rows, [rows, logits.length / rows]]
}

/** x Wᵀ + b. */
export function gemm(
  x: Float32Array,
  weight: Float32Array,
  bias: Float32Array,
  rows: number,
): Peer {
  const features = bias.length
  const channels = x.length / rows
  return onnxruntime(
    'onnxruntime Gemm',
    1e-5,
    {
      nodes: [
        {
          op: 'Gemm',
          inputs: ['x', 'weight', 'bias'],
          outputs: ['out'],
          ints: { transB: 1 },
        },
      ],
      inputs: [
        float('x', [rows, channels]),
        float('weight', [features, channels]),
        float('bias', [features]),
      ],
      outputs: [float('out', [rows, features])],
    },
    { x, weight, bias },
  )
}

/** log softmax of hidden weightᵀ at the targets; the logits are materialized. */
export function linearLogSoftmax(
  hidden: Float32Array,
  weight: Float32Array,
  targets: Int32Array,
): Peer {
  const rows = targets.length
  const channels = hidden.length / rows
  return onnxruntime(
    'onnxruntime Gemm, LogSoftmax',
    1e-5,
    {
      nodes: [
        { op: 'Gemm', inputs: ['hidden', 'weight'], outputs: ['logits'], ints: { transB: 1 } },
        { op: 'LogSoftmax', inputs: ['logits'], outputs: ['all'], ints: { axis: -1 } },
        { op: 'GatherElements', inputs: ['all', 'targets'], outputs: ['out'], ints: { axis: 1 } },
      ],
      inputs: [
        float('hidden', [rows, channels]),
        float('weight', [weight.length / channels, channels]),
        int64('targets', [rows, 1]),
      ],
      outputs: [float('out', [rows, 1])],
    },
    { hidden, weight, targets: BigInt64Array.from(targets, BigInt) },
  )
}

/** LayerNormalization over the last axis. */
export function layerNormalization(
  x: Float32Array,
  weight: Float32Array,
  bias: Float32Array,
  epsilon: number,
): Peer {
  const channels = weight.length
  const shape = [x.length / channels, channels]
  return onnxruntime(
    'onnxruntime LayerNormalization',
    1e-5,
    {
      nodes: [
        {
          op: 'LayerNormalization',
          inputs: ['x', 'weight', 'bias'],
          outputs: ['out'],
          ints: { axis: -1 },
          floats: { epsilon },
        },
      ],
      inputs: [float('x', shape), float('weight', [channels]), float('bias', [channels])],
      outputs: [float('out', shape)],
    },
    { x, weight, bias },
  )
}
