// One operation of each family on a small input, against its definition: what an installed package is
// tried with, wherever it can be loaded. Only Node is needed.

const near = (a, b, tolerance = 1e-4) => Math.abs(a - b) <= tolerance * (1 + Math.abs(b))
const row = (x, i, width) => Array.from(x.slice(i * width, (i + 1) * width))
const dot = (a, b) => a.reduce((sum, v, i) => sum + v * b[i], 0)
const logSoftmax = (x) => {
  const top = Math.max(...x)
  const sum = x.reduce((s, v) => s + Math.exp(v - top), 0)
  return x.map((v) => v - top - Math.log(sum))
}

/** Runs them on a device, given the package's exports; the names of the families, in order. */
export async function families(p2r, id = 'cpu') {
  const device = p2r.openDevice(id)
  const wave = (n, step) => Float32Array.from({ length: n }, (_, i) => Math.sin(step * (i + 1)))
  const f32 = (data, ...shape) => device.tensor(Float32Array.from(data), shape)
  const i32 = (data) => device.tensor(Int32Array.from(data), [data.length])
  const x = wave(24, 0.7) // [3, 8]
  const w = wave(40, 0.3) // [5, 8]
  const products = [0, 1, 2].flatMap((i) =>
    [0, 1, 2, 3, 4].map((o) => dot(row(x, i, 8), row(w, o, 8))),
  )
  const targets = [4, 0, 2]
  const image = Uint8Array.from({ length: 8 * 8 * 3 }, (_, i) => (i * 37) % 256)

  const made = {
    async attention() {
      const q = f32(x, 3, 1, 8)
      const { out } = p2r.attention({ q, k: q, v: q, cuSeqlens: [0, 3], scale: 0.5 })
      const weights = [0, 1, 2].map((i) =>
        logSoftmax([0, 1, 2].map((j) => 0.5 * dot(row(x, i, 8), row(x, j, 8)))).map(Math.exp),
      )
      return [
        await out.read(),
        weights.flatMap((all) =>
          [...Array(8).keys()].map((c) => dot(all, [x[c], x[8 + c], x[16 + c]])),
        ),
      ]
    },
    async cached_attention() {
      const cache = new p2r.KvCache(device, { layers: 1, kvHeads: 1, headDim: 8, pages: 1 })
      const q = f32(x, 3, 1, 8)
      const { out } = p2r.cachedAttention({
        q,
        k: q,
        v: q,
        cuSeqlens: [0, 3],
        cache,
        layer: 0,
        sequences: [cache.add()],
        scale: 0.5,
      })
      return [
        await out.read(),
        [0, 1, 2].flatMap((i) => {
          const seen = [0, 1, 2].slice(0, i + 1)
          const weights = logSoftmax(seen.map((j) => 0.5 * dot(row(x, i, 8), row(x, j, 8)))).map(
            Math.exp,
          )
          return [...Array(8).keys()].map((c) =>
            dot(
              weights,
              seen.map((j) => x[8 * j + c]),
            ),
          )
        }),
      ]
    },
    async rotary() {
      const { cos, sin } = p2r.visionRotary({ gridThw: [[1, 2, 2]], headDim: 8, device })
      const [c, s] = [await cos.read(), await sin.read()]
      const data = wave(32, 0.2)
      const out = p2r.applyRotary({ x: f32(data, 4, 1, 8), cos, sin })
      return [
        await out.read(),
        Array.from(data, (v, i) => {
          const half = i % 8 < 4 ? -data[i + 4] : data[i - 4]
          return v * c[i] + half * s[i]
        }),
      ]
    },
    async positions() {
      const table = f32([1, 2, 3, 4], 4, 1)
      const out = p2r.visionPositions({ table, gridThw: [[1, 2, 2]] })
      return [await out.read(), [1, 2, 3, 4]]
    },
    async draw_boxes() {
      const canvas = device.tensor(image, [8, 8, 3])
      const out = p2r.drawBoxes({ image: canvas, boxes: [[1, 1, 6, 6]], width: 1 })
      const drawn = image.map((v, i) => {
        const [px, py] = [Math.floor(i / 3) % 8, Math.floor(i / 24)]
        const inside = px >= 1 && px <= 6 && py >= 1 && py <= 6
        const edge = px === 1 || px === 6 || py === 1 || py === 6
        return inside && edge ? [255, 0, 0][i % 3] : v
      })
      return [await out.read(), drawn]
    },
    async crop_resample() {
      const canvas = device.tensor(image, [8, 8, 3])
      const [out] = p2r.cropResample({
        image: canvas,
        regions: [{ box: [2, 1, 6, 5], height: 4, width: 4 }],
      })
      const cut = Array.from({ length: 48 }, (_, i) => {
        const [px, py] = [(Math.floor(i / 3) % 4) + 2, Math.floor(i / 12) + 1]
        return image[(py * 8 + px) * 3 + (i % 3)]
      })
      return [await out.read(), cut]
    },
    async log_probs() {
      const { logProbs } = p2r.tokenLogProbs({ logits: f32(products, 3, 5), targets: i32(targets) })
      return [await logProbs.read(), targets.map((t, i) => logSoftmax(row(products, i, 5))[t])]
    },
    async advantages() {
      const rewards = f32([1, 0, 0, 1, 3, 3], 6)
      const out = p2r.groupAdvantages({
        rewards,
        groups: [0, 0, 0, 0, 1, 1],
        estimator: 'dr_grpo',
      })
      return [await out.read(), [0.5, -0.5, -0.5, 0.5, 0, 0]]
    },
    async policy_loss() {
      const logProbs = f32([-1, -2], 2)
      const { loss } = p2r.policyLoss({ logProbs, advantages: f32([2], 1), cuSeqlens: [0, 2] })
      return [await loss.read(), [-2]]
    },
    async rollout_correction() {
      const logProbs = f32([-1, -2], 2)
      const rolloutLogProbs = f32([-3, -2], 2)
      const { importanceWeights } = p2r.rolloutCorrection({
        logProbs,
        rolloutLogProbs,
        cuSeqlens: [0, 2],
      })
      return [await importanceWeights.read(), [2, 1]]
    },
    async cast() {
      return [await f32([1.5, -2.5, 3, 300], 4).cast('u8').read(), [1, 0, 3, 255]]
    },
    async linear() {
      return [await p2r.linear({ x: f32(x, 3, 8), weight: f32(w, 5, 8) }).read(), products]
    },
    async quantize() {
      const weight = f32([127, 0, -50, 0, 127, 4], 2, 3)
      const quantized = p2r.quantize({ weight, bits: 8 })
      return [await quantized.dequantize().read(), [127, 0, -50, 0, 127, 4]]
    },
    async linear_log_probs() {
      const { logProbs } = p2r.linearLogProbs({
        hidden: f32(x, 3, 8),
        weight: f32(w, 5, 8),
        targets: i32(targets),
      })
      return [await logProbs.read(), targets.map((t, i) => logSoftmax(row(products, i, 5))[t])]
    },
    async distillation() {
      const logits = [1, 2, 0, -1]
      const teacher = [0, 1, 1, 0]
      const [p, q] = [logSoftmax(logits), logSoftmax(teacher)]
      const out = p2r.distillation({ logits: f32(logits, 1, 4), teacherLogits: f32(teacher, 1, 4) })
      return [await out.read(), [p.reduce((sum, v, i) => sum + Math.exp(v) * (v - q[i]), 0)]]
    },
    async layer_norm() {
      const ones = f32(Array(8).fill(1), 8)
      const zeros = f32(Array(8).fill(0), 8)
      const { out } = p2r.layerNorm({ x: f32(x, 3, 8), weight: ones, bias: zeros, eps: 1e-5 })
      const expected = [0, 1, 2].flatMap((i) => {
        const values = row(x, i, 8)
        const mean = values.reduce((s, v) => s + v, 0) / 8
        const variance = values.reduce((s, v) => s + (v - mean) ** 2, 0) / 8
        return values.map((v) => (v - mean) / Math.sqrt(variance + 1e-5))
      })
      return [await out.read(), expected]
    },
    async rms_norm() {
      const { out } = p2r.rmsNorm({ x: f32(x, 3, 8), weight: f32(Array(8).fill(2), 8), eps: 1e-5 })
      const expected = [0, 1, 2].flatMap((i) => {
        const values = row(x, i, 8)
        const square = dot(values, values) / 8
        return values.map((v) => (2 * v) / Math.sqrt(square + 1e-5))
      })
      return [await out.read(), expected]
    },
    async swiglu() {
      const out = p2r.swiglu({ gate: f32(x, 24), up: f32(x, 24) })
      return [await out.read(), Array.from(x, (v) => (v * v) / (1 + Math.exp(-v)))]
    },
    async gelu() {
      const out = p2r.gelu({ x: f32(x, 24), approximate: 'tanh' })
      const c = Math.sqrt(2 / Math.PI)
      return [
        await out.read(),
        Array.from(x, (v) => 0.5 * v * (1 + Math.tanh(c * (v + 0.044715 * v ** 3)))),
      ]
    },
    async elementwise() {
      const out = p2r.mul({ x: f32(x, 3, 8), y: f32([1, 2, 3], 3, 1) })
      return [await out.read(), Array.from(x, (v, i) => v * (1 + Math.floor(i / 8)))]
    },
    async reduce() {
      const out = p2r.sum({ x: f32(x, 3, 8), axes: [1] })
      return [await out.read(), [0, 1, 2].map((i) => dot(row(x, i, 8), Array(8).fill(1)))]
    },
    async rearrange() {
      const out = p2r.transpose({ x: f32(x, 3, 8) })
      return [
        await out.read(),
        [...Array(24).keys()].map((k) => x[(k % 3) * 8 + Math.floor(k / 3)]),
      ]
    },
    async rows() {
      const out = p2r.gatherRows({ x: f32(x, 3, 8), index: [2, 0] })
      return [await out.read(), [...row(x, 2, 8), ...row(x, 0, 8)]]
    },
    async sampling() {
      const logits = f32(products, 3, 5)
      const best = [0, 1, 2].map((i) => {
        const values = row(products, i, 5)
        return values.indexOf(Math.max(...values))
      })
      return [await p2r.sample({ logits, temperature: 0, seed: 1 }).read(), best]
    },
    async optimizer() {
      const norm = p2r.clipGradNorm({ grads: [f32([3], 1), f32([4], 1)], maxNorm: 1 })
      return [await norm.read(), [5]]
    },
  }
  for (const [family, run] of Object.entries(made)) {
    const [got, expected] = await run()
    const wrong = expected.findIndex((value, i) => !near(got[i], value))
    if (got.length !== expected.length || wrong >= 0)
      throw new Error(
        `${family}: [${wrong}] of ${got.length} is ${got[wrong]}, not ${expected[wrong]}`,
      )
  }
  device.dispose()
  return Object.keys(made)
}
