// The two whole models of the reference data, as folders that Hugging Face would write.
import { mkdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import type { Device, Grid, Vision } from 'p2r-kernels'
import { golden } from './golden.js'

const files = golden('qwen3vl')

export const goldenModels = ['m1_d32_gqa2_tied', 'm2_d128_mqa_untied'] as const
export type GoldenModel = (typeof goldenModels)[number]

export const modelFile = (name: GoldenModel, file: string): Uint8Array =>
  files.bytes(`qwen3vl/${name}/${file}`)
export const modelJson = (name: GoldenModel, file: string) =>
  // biome-ignore lint/suspicious/noExplicitAny: the files' own shapes
  files.json<any>(`qwen3vl/${name}/${file}`)

/** A tensor of the reference; undefined where the model has none of this name. */
export function modelF32(name: GoldenModel, file: string): Float32Array {
  return files.f32(`qwen3vl/${name}/${file}.bin`)
}
export function modelI32(name: GoldenModel, file: string): Int32Array {
  return files.i32(`qwen3vl/${name}/${file}.bin`)
}
export const modelHas = (name: GoldenModel, file: string): boolean =>
  files.list(`qwen3vl/${name}/${file}.bin`).length > 0

export function modelGrids(name: GoldenModel, file: string): Grid[] {
  if (!modelHas(name, file)) return []
  const list = modelI32(name, file)
  return Array.from({ length: list.length / 3 }, (_, i) => [
    list[3 * i]!,
    list[3 * i + 1]!,
    list[3 * i + 2]!,
  ])
}

/** The images or videos of some sequences, whose patches follow one another. */
export function visionOf(
  device: Device,
  name: GoldenModel,
  kind: 'images' | 'videos',
  [from, to] = [0, Number.POSITIVE_INFINITY],
): { images?: Vision; videos?: Vision } {
  const counts: number[] = modelJson(name, 'meta.json')[`${kind}_per_sequence`]
  const first = counts.slice(0, from).reduce((sum, n) => sum + n, 0)
  const count = counts.slice(from, to).reduce((sum, n) => sum + n, 0)
  return visionAt(device, name, kind, first, count)
}

/** All sequences of the reference, with their images and videos. */
export function packedOf(device: Device, name: GoldenModel) {
  return {
    tokens: modelI32(name, 'input_ids'),
    cuSeqlens: modelI32(name, 'cu_seqlens'),
    ...visionOf(device, name, 'images'),
    ...visionOf(device, name, 'videos'),
  }
}

/** `count` of all images or videos from `first` on. */
export function visionAt(
  device: Device,
  name: GoldenModel,
  kind: 'images' | 'videos',
  first: number,
  count: number,
): { images?: Vision; videos?: Vision } {
  if (!count) return {}
  const suffix = kind === 'images' ? '' : '_videos'
  const grids = modelGrids(name, kind === 'images' ? 'image_grid_thw' : 'video_grid_thw')
  const patches = (list: typeof grids) => list.reduce((sum, [t, h, w]) => sum + t * h * w, 0)
  const own = grids.slice(first, first + count)
  const at = patches(grids.slice(0, first))
  const all = modelF32(name, `pixel_values${suffix}`)
  const width = all.length / patches(grids)
  const pixels = all.slice(at * width, (at + patches(own)) * width)
  return {
    [kind]: { pixelValues: device.tensor(pixels, [patches(own), width]), gridThw: own },
  }
}

export interface Stored {
  header: Record<string, { dtype: string; shape: number[]; data_offsets: [number, number] }>
  data: Uint8Array
}

export function readStored(bytes: Uint8Array): Stored {
  const view = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length)
  const length = Number(view.readBigUInt64LE())
  const { __metadata__: _, ...header } = JSON.parse(view.toString('utf8', 8, 8 + length))
  return { header, data: bytes.subarray(8 + length) }
}

/** A safetensors file of some of the tensors, under other names. */
function writeStored(path: string, { header, data }: Stored, rename: Map<string, string>): void {
  const kept: Stored['header'] = {}
  const parts: Uint8Array[] = []
  let end = 0
  for (const [name, stored] of rename) {
    const { data_offsets: offsets, ...rest } = header[stored]!
    const part = data.subarray(...offsets)
    kept[name] = { ...rest, data_offsets: [end, end + part.length] }
    parts.push(part)
    end += part.length
  }
  const json = Buffer.from(JSON.stringify(kept))
  const start = Buffer.alloc(8)
  start.writeBigUInt64LE(BigInt(json.length))
  writeFileSync(path, Buffer.concat([start, json, ...parts]))
}

export interface FolderOptions {
  /** Of the stored names. */
  rename?: (name: string) => string
  /** Files; more than one get an index. */
  shards?: number
  /** Changes config.json. */
  config?: (json: Record<string, never>) => void
  /** Copies of tensors under further names. */
  copies?: Record<string, string>
  /** Left out. */
  without?: (name: string) => boolean
}

/** Writes a model of the reference into a folder. */
export function writeModel(folder: string, name: GoldenModel, options: FolderOptions = {}): string {
  const { rename = (x) => x, shards = 1, copies = {}, without = () => false } = options
  mkdirSync(folder, { recursive: true })
  const config = modelJson(name, 'config.json')
  options.config?.(config)
  writeFileSync(join(folder, 'config.json'), JSON.stringify(config))
  writeFileSync(join(folder, 'generation_config.json'), modelFile(name, 'generation_config.json'))
  const stored = readStored(modelFile(name, 'model.safetensors'))
  const names = [
    ...Object.keys(stored.header).map((of) => [rename(of), of] as const),
    ...Object.entries(copies),
  ].filter(([, of]) => !without(of))
  const map: Record<string, string> = {}
  for (let i = 0; i < shards; i++) {
    const file = shards === 1 ? 'model.safetensors' : `model-${i + 1}-of-${shards}.safetensors`
    const own = names.filter((_, at) => at % shards === i)
    for (const [as] of own) map[as] = file
    writeStored(join(folder, file), stored, new Map(own))
  }
  if (shards > 1)
    writeFileSync(
      join(folder, 'model.safetensors.index.json'),
      JSON.stringify({ metadata: {}, weight_map: map }),
    )
  return folder
}
