import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type Device, saveTensors, type Tensor, VisionTower } from 'p2r-kernels'
import { afterAll, expect, test } from 'vitest'
import { golden } from './golden.js'
import { expectRefusal, type Float, onEveryBackend, relativeL2 } from './harness.js'

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
      [{ depth: 'three' }, /depth must be a positive integer/],
    ] as const)
      await refused(await folderOf(device, name, { change }), 'ERR_FORMAT', message)
    expect(device.memory().liveBytes).toBe(before)
  })
})
