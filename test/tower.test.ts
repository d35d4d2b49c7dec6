import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type Device, type Grid, saveTensors, type Tensor, VisionTower } from 'p2r-kernels'
import { afterAll, expect, test } from 'vitest'
import { golden } from './golden.js'
import { expectRefusal, type Float, onEveryBackend, Random, relativeL2 } from './harness.js'
import { encodeVision, type TowerConfig } from './vision_tower.js'

const files = golden('tower')
const names = [...new Set(files.list('tower/').map((path) => path.split('/')[1]!))]
const root = mkdtempSync(join(tmpdir(), 'tower-'))
afterAll(() => rmSync(root, { recursive: true, force: true }))

const metaOf = (name: string) => files.json(`tower/${name}/meta.json`)

/** Changes a tensor's type in a file's header, for one of the same size. */
function setStoredType(path: string, name: string, dtype: string): void {
  const bytes = readFileSync(path)
  const length = Number(bytes.readBigUInt64LE())
  const header = JSON.parse(bytes.toString('utf8', 8, 8 + length))
  header[name].dtype = dtype
  const text = Buffer.from(JSON.stringify(header))
  const start = Buffer.alloc(8)
  start.writeBigUInt64LE(BigInt(text.length))
  writeFileSync(path, Buffer.concat([start, text, bytes.subarray(8 + length)]))
}

/** A folder as a checkpoint has it, in `parts` files. */
async function folderOf(
  device: Device,
  name: string,
  { dtype = 'f32' as Float, prefix = '', parts = 1, change = {} as Record<string, unknown> } = {},
): Promise<string> {
  const folder = mkdtempSync(join(root, 'model-'))
  const meta = metaOf(name)
  const shards: Record<string, Tensor>[] = Array.from({ length: parts }, () => ({}))
  const map: Record<string, string> = {}
  const fileOf = (i: number) => (parts === 1 ? 'model.safetensors' : `model-${i}.safetensors`)
  Object.entries<{ shape: number[] }>(meta.weights).forEach(([weight, { shape }], at) => {
    const data = files.f32(`tower/${name}/weights/${weight}.bin`)
    shards[at % parts]![prefix + weight] = device.tensor(data, shape, dtype)
    map[prefix + weight] = fileOf(at % parts)
  })
  // What belongs to the language model is left alone, whatever its type.
  const foreign = 'model.language_model.embed_tokens.weight'
  shards[0]![foreign] = device.tensor([1, 2], [2], 'u8')
  for (const [i, shard] of shards.entries()) {
    await saveTensors(join(folder, fileOf(i)), shard)
    if (i === 0) setStoredType(join(folder, fileOf(i)), foreign, 'F8_E4M3')
    for (const tensor of Object.values(shard)) tensor.dispose()
  }
  const config = { ...meta.config, ...change }
  const whole = prefix ? { model_type: 'qwen3_vl', vision_config: config } : config
  writeFileSync(join(folder, 'config.json'), JSON.stringify(whole))
  if (parts > 1)
    writeFileSync(
      join(folder, 'model.safetensors.index.json'),
      JSON.stringify({ metadata: {}, weight_map: map }),
    )
  return folder
}

/** A checkpoint of Qwen3.5's form: the tower beside a language model and a head that predicts further tokens. */
async function qwen35Folder(device: Device, config: TowerConfig & Record<string, unknown>) {
  const folder = mkdtempSync(join(root, 'qwen35-'))
  const random = new Random(11)
  const weights: Record<string, Float32Array> = {}
  const tensors: Record<string, Tensor> = {}
  const weight = (name: string, shape: number[], scale: number, mean = 0) => {
    const values = random.normals(
      shape.reduce((n, d) => n * d, 1),
      scale,
    )
    weights[name] = values.map((v) => v + mean)
    tensors[`model.visual.${name}`] = device.tensor(weights[name], shape)
  }
  const linear = (name: string, inputs: number, outputs: number) => {
    weight(`${name}.weight`, [outputs, inputs], 1 / Math.sqrt(inputs))
    weight(`${name}.bias`, [outputs], 0.1)
  }
  const norm = (name: string) => {
    weight(`${name}.weight`, [hidden], 0.1, 1)
    weight(`${name}.bias`, [hidden], 0.1)
  }
  const { hidden_size: hidden, intermediate_size: inner } = config
  linear('patch_embed.proj', 6 * config.patch_size ** 2, hidden)
  weight('pos_embed.weight', [config.num_position_embeddings, hidden], 0.5)
  for (let i = 0; i < config.depth; i++) {
    for (const each of ['norm1', 'norm2']) norm(`blocks.${i}.${each}`)
    linear(`blocks.${i}.attn.qkv`, hidden, 3 * hidden)
    linear(`blocks.${i}.attn.proj`, hidden, hidden)
    linear(`blocks.${i}.mlp.linear_fc1`, hidden, inner)
    linear(`blocks.${i}.mlp.linear_fc2`, inner, hidden)
  }
  norm('merger.norm')
  linear('merger.linear_fc1', 4 * hidden, 4 * hidden)
  linear('merger.linear_fc2', 4 * hidden, config.out_hidden_size)
  for (const name of ['model.language_model.layers.0.linear_attn.A_log', 'mtp.norm.weight'])
    tensors[name] = device.tensor([1], [1])
  await saveTensors(join(folder, 'model.safetensors'), tensors)
  for (const tensor of Object.values(tensors)) tensor.dispose()
  const whole = {
    model_type: 'qwen3_5',
    text_config: { model_type: 'qwen3_5_text', layer_types: ['linear_attention'] },
    vision_config: config,
  }
  writeFileSync(join(folder, 'config.json'), JSON.stringify(whole))
  return { folder, weights }
}

test('the float64 tower is the golden’s', () => {
  for (const name of names) {
    const { config, grid_thw, weights } = metaOf(name)
    const f32 = (file: string) => files.f32(`tower/${name}/${file}.bin`)
    const all = Object.fromEntries(Object.keys(weights).map((w) => [w, f32(`weights/${w}`)]))
    const merged = encodeVision(config, all, f32('pixel_values'), grid_thw)
    expect(relativeL2(merged, f32('merged'))).toBeLessThan(1e-5)
  }
})

onEveryBackend('VisionTower', (b) => {
  for (const name of names) {
    const meta = metaOf(name)
    const f32 = (file: string) => files.f32(`tower/${name}/${file}.bin`)
    const pixels = () => b.device.tensor(f32('pixel_values'), meta.tensors.pixel_values.shape)
    // The gates of the goldens' README: what honest arithmetic of each type stays within.
    for (const [dtype, gate] of [
      ['f32', 1e-5],
      ['bf16', 2.5e-2],
    ] as const)
      test(`golden ${name} in ${dtype}`, async () => {
        using tower = await VisionTower.load(await folderOf(b.device, name), b.device, { dtype })
        const { depth, heads } = tower.config
        const every = Array.from({ length: depth }, (_, i) => i)
        using x = pixels()
        using out = tower.encode({
          pixelValues: x,
          gridThw: meta.grid_thw,
          hiddenStates: true,
          massOf: every,
        })
        expect(out.merged.shape).toEqual(meta.tensors.merged.shape)
        expect(relativeL2(await out.merged.toFloat32(), f32('merged'))).toBeLessThan(gate)
        expect(out.deepstack).toHaveLength(meta.config.deepstack_visual_indexes.length)
        for (const [i, tap] of out.deepstack.entries())
          expect(relativeL2(await tap.toFloat32(), f32(`deepstack_${i}`))).toBeLessThan(gate)
        expect(out.hidden).toHaveLength(depth + 1)
        for (const [i, state] of out.hidden!.entries())
          expect(relativeL2(await state.toFloat32(), f32(`hidden_${i}`))).toBeLessThan(gate)
        // Each query distributes a probability of 1, in each head, within its frame.
        for (const mass of out.mass!) {
          expect(mass.shape).toEqual([heads, meta.tokens])
          const values = await mass.toFloat32()
          let at = 0
          for (let head = 0; head < heads; head++)
            for (const [t, h, w] of meta.grid_thw)
              for (let frame = 0; frame < t; frame++) {
                let sum = 0
                for (let i = 0; i < h * w; i++) sum += values[at++]!
                expect(Math.abs(sum - h * w)).toBeLessThan(h * w * (dtype === 'f32' ? 1e-5 : 1e-2))
              }
        }
      })
  }

  // The gates of the goldens of whole models.
  test.each(names.flatMap((name) => ['none', 'block'].map((checkpoint) => [name, checkpoint])))(
    'golden gradients of %s, checkpoint %s',
    async (name, checkpoint) => {
      const meta = metaOf(name!)
      const f32 = (file: string) => files.f32(`tower/${name}/${file}.bin`)
      const tensor = (file: string) => b.device.tensor(f32(file), meta.tensors[file].shape)
      using tower = await VisionTower.load(await folderOf(b.device, name!), b.device)
      const taps: number[] = meta.config.deepstack_visual_indexes
      const a = {
        pixelValues: tensor('pixel_values'),
        gridThw: meta.grid_thw as Grid[],
        dMerged: tensor('grad_merged'),
        dDeepstack: taps.map((_, i) => tensor(`grad_deepstack_${i}`)),
        checkpoint: checkpoint as 'none' | 'block',
        inputs: true,
      }
      using made = tower.backward(a)
      expect(relativeL2(await made.dPixels!.read(), f32('grad_pixel_values'))).toBeLessThan(5e-5)
      const stored = Object.keys(meta.tensors).filter((file) => file.startsWith('grad_weight.'))
      expect(stored.length).toBeGreaterThan(2)
      for (const file of stored) {
        const gradient = made.gradients[file.replace('grad_weight.', '')]!
        expect(relativeL2(await gradient.read(), f32(file)), file).toBeLessThan(5e-5)
      }
      for (const [weight, { shape }] of tower.parameters())
        expect(made.gradients[weight]!.shape, weight).toEqual(shape)
      // Added to what is given, in place; and of the results alone that have a gradient.
      const before = await made.gradients['merger.linear_fc2.weight']!.read()
      using twice = tower.backward({ ...a, into: made.gradients })
      expect(await made.gradients['merger.linear_fc2.weight']!.read()).toEqual(
        before.map((x) => 2 * x),
      )
      expect(await twice.gradients['patch_embed.proj.weight']!.read()).toEqual(
        await made.gradients['patch_embed.proj.weight']!.read(),
      )
      using none = tower.record({ pixelValues: a.pixelValues, gridThw: a.gridThw })
      using zero = none.backward({})
      expect((await zero.gradients['blocks.0.norm1.weight']!.read()).every((x) => x === 0)).toBe(
        true,
      )
      expectRefusal(() => none.backward({}), 'ERR_VALUE', 'VisionTower', /used up/)
      expectRefusal(
        () => tower.backward({ ...a, dMerged: a.pixelValues }),
        'ERR_SHAPE',
        'VisionTower',
        /dMerged/,
      )
      expectRefusal(
        () => tower.backward({ ...a, dDeepstack: [] }),
        'ERR_VALUE',
        'VisionTower',
        /dDeepstack must hold/,
      )
    },
  )

  // Qwen3.5 and later: no DeepStack, in the config or among the weights, and heads of 64 and 72.
  test.each([
    ['0.8B', { hidden_size: 128, num_heads: 2 }],
    ['2B and 4B', { hidden_size: 256, num_heads: 4 }],
    ['9B and more', { hidden_size: 144, num_heads: 2 }],
  ] as const)('a tower of Qwen3.5 %s, made small', async (_, sizes) => {
    const config = {
      ...{ depth: 2, intermediate_size: 96, out_hidden_size: 40, num_position_embeddings: 36 },
      ...{ patch_size: 4, hidden_act: 'gelu_pytorch_tanh', in_channels: 3, spatial_merge_size: 2 },
      ...{ temporal_patch_size: 2, model_type: 'qwen3_5', ...sizes },
    }
    const { folder, weights } = await qwen35Folder(b.device, config)
    const grid: Grid[] = [
      [1, 4, 6],
      [2, 2, 4],
    ]
    const pixels = new Random(5).normals(40 * 96)
    using x = b.device.tensor(pixels, [40, 96])
    const expected = encodeVision(config, weights, pixels, grid)
    for (const [dtype, gate] of [
      ['f32', 1e-5],
      ['bf16', 2.5e-2],
    ] as const) {
      using tower = await VisionTower.load(folder, b.device, { dtype })
      expect(tower.config).toMatchObject({
        headDim: sizes.hidden_size / sizes.num_heads,
        deepstack: [],
      })
      using out = tower.encode({ pixelValues: x, gridThw: grid })
      expect(out.deepstack).toEqual([])
      expect(relativeL2(await out.merged.toFloat32(), expected)).toBeLessThan(gate)
    }
  })

  const [name] = names as [string, string]
  const meta = metaOf(name)
  const pixels = (device = b.device) =>
    device.tensor(files.f32(`tower/${name}/pixel_values.bin`), meta.tensors.pixel_values.shape)

  test('loads shards, prefixes and 16-bit weights, and no other weights', async () => {
    const merged: Float32Array[] = []
    for (const options of [
      { dtype: 'bf16' },
      { dtype: 'bf16', prefix: 'model.visual.' },
      { dtype: 'bf16', prefix: 'visual.', parts: 3 },
      { dtype: 'f32' },
    ] as const) {
      using tower = await VisionTower.load(await folderOf(b.device, name, options), b.device, {
        ...(options.dtype === 'f32' ? { dtype: 'bf16' } : {}),
      })
      expect(tower.dtype).toBe('bf16')
      using x = pixels()
      using out = tower.encode({ pixelValues: x, gridThw: meta.grid_thw })
      expect(Object.keys(out).sort()).toEqual(['deepstack', 'merged'])
      merged.push(await out.merged.toFloat32())
    }
    for (const other of merged) expect(other).toEqual(merged[0])
  })

  test('keeps only its results in memory, and nothing once it is disposed', async () => {
    using device = b.open()
    const folder = await folderOf(device, name)
    const before = device.memory().liveBytes
    const tower = await VisionTower.load(folder, device)
    const loaded = device.memory().liveBytes
    const x = pixels(device)
    const out = tower.encode({ pixelValues: x, gridThw: meta.grid_thw, massOf: [0] })
    await out.merged.read()
    const results = [out.merged, ...out.deepstack, ...out.mass!]
    const bytes = results.reduce((n, t) => n + t.byteLength, x.byteLength)
    expect(device.memory().liveBytes - loaded).toBe(bytes)
    out.dispose()
    x.dispose()
    tower.dispose()
    expect(device.memory().liveBytes).toBe(before)
  })

  test('refuses mismatched patches, blocks and tensors', async () => {
    using tower = await VisionTower.load(await folderOf(b.device, name), b.device)
    using x = pixels()
    const encode = (a: object) => () =>
      tower.encode({ pixelValues: x, gridThw: meta.grid_thw, ...a } as never)
    expectRefusal(encode({ gridThw: [[1, 4, 6]] }), 'ERR_SHAPE', 'VisionTower', /\[24, 1536\]/)
    expectRefusal(encode({ gridThw: [[1, 3, 6]] }), 'ERR_VALUE', 'VisionTower', /mergeSize/)
    expectRefusal(encode({ massOf: [3] }), 'ERR_VALUE', 'VisionTower', /0 to 2, got 3/)
    expectRefusal(encode({ pixelValues: 1 }), 'ERR_VALUE', 'VisionTower')
    tower.dispose()
    expectRefusal(encode({}), 'ERR_DISPOSED', 'VisionTower')
  })

  test('reports what is wrong with a folder, and frees what was loaded', async () => {
    using device = b.open()
    const before = device.memory().liveBytes
    const load = (folder: string) => VisionTower.load(folder, device)
    const refused = async (folder: string, code: string, message: RegExp) => {
      const error = await load(folder).then(
        () => expect.fail('it loaded'),
        (e) => e,
      )
      expect(error).toMatchObject({ name: 'P2RError', code, op: 'VisionTower' })
      expect(error.message).toMatch(message)
    }
    await refused(join(root, 'nowhere'), 'ERR_IO', /config\.json could not be read/)
    const empty = mkdtempSync(join(root, 'empty-'))
    writeFileSync(join(empty, 'config.json'), 'not json')
    await refused(empty, 'ERR_FORMAT', /not JSON/)
    writeFileSync(join(empty, 'config.json'), JSON.stringify(meta.config))
    await refused(empty, 'ERR_IO', /no safetensors file/)
    for (const [change, message] of [
      [{ depth: 4 }, /no weight 'blocks\.3\./],
      [{ intermediate_size: 8 }, /must be \[8, 64\], got \[112, 64\]/],
      [{ num_heads: 3 }, /multiple of 8/],
      [{ hidden_act: 'silu' }, /hidden_act/],
      [{ deepstack_visual_indexes: [7] }, /deepstack_visual_indexes/],
      [{ depth: 'three' }, /depth must be an integer from 1 to 1024/],
    ] as const)
      await refused(await folderOf(device, name, { change }), 'ERR_FORMAT', message)
    expect(device.memory().liveBytes).toBe(before)
  })
})
