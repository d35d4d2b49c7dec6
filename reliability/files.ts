// Files with errors: of every kind that the package reads, whole ones are written and then cut, changed and mixed. Each
// is refused with a P2RError or read, in memory in proportion to its size.
import { mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import {
  functionPolicy,
  loadImage,
  loadMetadata,
  loadRollouts,
  loadTensors,
  openDevice,
  P2RError,
  PraGrpo,
  Qwen3VL,
  RecordedPolicy,
  recordPolicy,
  saveRollouts,
  saveTensors,
  VisionTower,
} from 'p2r-kernels'
import sharp from 'sharp'
import { Gen } from './gen.js'

export interface FilesOutcome {
  mutations: number
  read: number
  refused: number
  /** Mutations by the kind of file. */
  byKind: Record<string, number>
  /** The largest growth of the process's memory over one mutation, in bytes. */
  largestGrowth: number
  faults: string[]
}

/** A whole file, and how it is read. */
interface Kind {
  name: string
  bytes: Buffer
  read: (bytes: Buffer) => Promise<unknown>
}

/** By default an image may have 100 megapixels, whatever the size of its file; here a growth is to tell. */
const maxPixels = 2 ** 20
/** Growth that a file of a few kilobytes may cause: a decoder's own tables, and the collector's slack. */
const mostGrowth = 300 * 2 ** 20

async function kindsIn(
  folder: string,
  device: ReturnType<typeof openDevice>,
  model: string | undefined,
): Promise<Kind[]> {
  const kinds: Kind[] = []
  const path = (name: string): string => join(folder, name)
  const byPath = (name: string, file: string, read: (path: string) => Promise<unknown>): Kind => ({
    name,
    bytes: readFileSync(path(file)),
    read: (bytes) => {
      writeFileSync(path(file), bytes)
      return read(path(file))
    },
  })

  const pixels = { width: 12, height: 9, channels: 3, background: '#468' } as const
  const image = () => sharp({ create: pixels })
  for (const [name, encoded] of Object.entries({
    png: image().png(),
    jpeg: image().jpeg(),
    webp: image().webp(),
    tiff: image().tiff(),
    gif: image().gif(),
    avif: image().avif(),
  }))
    kinds.push({
      name,
      bytes: await encoded.toBuffer(),
      read: (bytes) => loadImage(bytes, device, { maxPixels }),
    })
  kinds.push({
    name: 'bmp',
    bytes: bitmap(12, 9),
    read: (bytes) => loadImage(bytes, device, { maxPixels }),
  })

  await saveTensors(
    path('t.safetensors'),
    { a: device.zeros([4, 5]), b: device.zeros([3], 'bf16') },
    { m: 'x' },
  )
  kinds.push(
    byPath('safetensors', 't.safetensors', async (file) => {
      await loadMetadata(file)
      return loadTensors(file, device)
    }),
  ) // prettier-ignore

  const policy = functionPolicy(() => ({ text: '[]', tokens: [1, 2], logProbs: [-1, -2] }))
  const request = { role: 'perceiver', system: '', prompt: 'p', images: [], n: 2 } as const
  await recordPolicy(policy, path('r.jsonl')).generate(request)
  kinds.push(
    byPath('recording', 'r.jsonl', async (file) =>
      (await RecordedPolicy.load(file)).generate(request),
    ),
  )

  const answers = functionPolicy(() => ({
    text: '<answer>A</answer>',
    tokens: [3],
    logProbs: [-1],
  }))
  const trainer = new PraGrpo({ perceiver: policy, reasoner: answers, device, groupSize: 2 })
  const sample = {
    image: device.zeros([32, 32, 3], 'u8'),
    question: 'q',
    answerForm: 'mca',
    truth: 'A',
  } as const
  const batch = await trainer.rollout([sample])
  await saveRollouts(path('rollouts.safetensors'), batch)
  kinds.push(byPath('rollouts', 'rollouts.safetensors', (file) => loadRollouts(file, device)))

  if (model) {
    const small = { dtype: 'f32', cacheTokens: 64 } as const
    for (const file of ['config.json', 'generation_config.json', 'model.safetensors'])
      if (exists(join(model, file))) {
        const own = path(`model-${file}`)
        mkdirSync(own, { recursive: true })
        for (const each of [
          'config.json',
          'generation_config.json',
          'model.safetensors',
          'tokenizer.json',
        ])
          if (exists(join(model, each)))
            writeFileSync(join(own, each), readFileSync(join(model, each)))
        kinds.push({
          name: file === 'model.safetensors' ? 'checkpoint' : 'config',
          bytes: readFileSync(join(model, file)),
          read: async (bytes) => {
            writeFileSync(join(own, file), bytes)
            const tower = await VisionTower.load(own, device)
            tower.dispose()
            return Qwen3VL.load(own, device, small)
          },
        })
      }
    const own = path('model-tokenizer')
    mkdirSync(own, { recursive: true })
    for (const each of ['config.json', 'generation_config.json', 'model.safetensors'])
      if (exists(join(model, each))) writeFileSync(join(own, each), readFileSync(join(model, each)))
    if (exists(join(model, 'tokenizer.json'))) {
      const loaded = await Qwen3VL.load(own, device, small)
      kinds.push({
        name: 'tokenizer',
        bytes: readFileSync(join(model, 'tokenizer.json')),
        read: async (bytes) => {
          // A text that is no JSON is refused where the file is read.
          writeFileSync(join(own, 'tokenizer.json'), bytes)
          const read = await Qwen3VL.load(own, device, small)
          try {
            return await read.tokenizer()
          } finally {
            read.dispose()
          }
        },
      })
      loaded.dispose()
    }
  }
  batch.dispose()
  return kinds
}

function exists(path: string): boolean {
  try {
    readFileSync(path)
    return true
  } catch {
    return false
  }
}

/** An uncompressed Windows bitmap. */
function bitmap(width: number, height: number): Buffer {
  const row = Math.ceil((3 * width) / 4) * 4
  const bytes = Buffer.alloc(54 + row * height, 77)
  bytes.write('BM')
  bytes.writeUInt32LE(bytes.length, 2)
  bytes.writeUInt32LE(0, 6)
  bytes.writeUInt32LE(54, 10)
  bytes.writeUInt32LE(40, 14)
  bytes.writeInt32LE(width, 18)
  bytes.writeInt32LE(height, 22)
  bytes.writeUInt16LE(1, 26)
  bytes.writeUInt16LE(24, 28)
  bytes.fill(0, 30, 54)
  return bytes
}

/** A copy with one to four errors: bits, bytes, numbers at their limits, cuts, repeats, and pieces of itself elsewhere. */
function mutate(whole: Buffer, g: Gen): Buffer {
  let bytes = Buffer.from(whole)
  for (let times = g.int(1, 4); times > 0; times--) {
    // Headers stand first, so that half of the errors are there.
    const size = Math.max(1, g.uniform() < 0.5 ? Math.min(bytes.length, 400) : bytes.length)
    const at = g.int(0, size - 1)
    switch (g.int(0, 7)) {
      case 0:
        bytes[at] = (bytes[at] ?? 0) ^ (1 << g.int(0, 7))
        break
      case 1:
        bytes[at] = g.int(0, 255)
        break
      case 2:
        bytes = bytes.subarray(0, at)
        break
      case 3:
        bytes = Buffer.concat([bytes.subarray(0, at), bytes.subarray(g.int(0, bytes.length))])
        break
      case 4: {
        const from = g.int(0, Math.max(0, bytes.length - 1))
        bytes = Buffer.concat([
          bytes.subarray(0, at),
          bytes.subarray(from, from + g.int(1, 64)),
          bytes.subarray(at),
        ])
        break
      }
      case 5:
        if (at + 4 <= bytes.length)
          bytes.writeUInt32LE(g.pick([0, 1, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1, 2 ** 24]), at)
        break
      case 6: {
        // A number in a text.
        const text = bytes
          .toString('latin1')
          .replace(/\d+/g, (n) =>
            g.uniform() < 0.1
              ? g.pick(['-1', '1e9', '0', '99999999999999999999', '0.5', 'null'])
              : n,
          )
        bytes = Buffer.from(text, 'latin1')
        break
      }
      default:
        bytes = Buffer.concat([bytes, Buffer.alloc(g.int(1, 200), g.int(0, 255))])
    }
  }
  return bytes
}

export async function mutateFiles(
  seed: number,
  count: number,
  folder: string,
  model?: string,
  tell: (what: string) => void = () => {},
): Promise<FilesOutcome> {
  mkdirSync(folder, { recursive: true })
  const device = openDevice('cpu', { threads: 2 })
  const g = new Gen(device, seed, folder)
  const outcome: FilesOutcome = {
    mutations: 0,
    read: 0,
    refused: 0,
    byKind: {},
    largestGrowth: 0,
    faults: [],
  }
  const kinds = await kindsIn(folder, device, model)
  // Whole files are read: a mutation is refused for its error.
  for (const { name, bytes, read } of kinds)
    release(
      await read(bytes).catch((error) => {
        outcome.faults.push(`${name}: a whole file is refused: ${error}`)
      }),
    ) // prettier-ignore
  for (let i = 0; i < count; i++) {
    const { name, bytes, read } = kinds[i % kinds.length]!
    const broken = mutate(bytes, g)
    const title = `seed ${seed}, mutation ${i} of a ${name}`
    tell(title)
    const before = process.memoryUsage.rss()
    try {
      release(await read(broken))
      outcome.read++
    } catch (error) {
      outcome.refused++
      if (!(error instanceof P2RError))
        outcome.faults.push(
          `${title}: ${error instanceof Error ? error.stack?.split('\n').slice(0, 3).join(' | ') : error}`,
        )
    }
    const growth = process.memoryUsage.rss() - before
    outcome.largestGrowth = Math.max(outcome.largestGrowth, growth)
    if (growth > mostGrowth)
      outcome.faults.push(`${title}: memory grew by ${Math.round(growth / 2 ** 20)} MiB`)
    outcome.mutations++
    outcome.byKind[name] = (outcome.byKind[name] ?? 0) + 1
  }
  device.dispose()
  rmSync(folder, { recursive: true, force: true })
  return outcome
}

/** Frees what a reader made: a tensor, a model, or a table of tensors. */
function release(made: unknown): void {
  if (typeof made !== 'object' || made === null) return
  if ('dispose' in made && typeof made.dispose === 'function') made.dispose()
  else for (const each of Object.values(made)) release(each)
}
