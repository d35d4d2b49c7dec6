// Folders of checkpoints in Hugging Face's form.
import { readdir } from 'node:fs/promises'
import { basename, join } from 'node:path'
import { isJsonObject } from './arguments.js'
import type { Device } from './device.js'
import { P2RError, refuse } from './errors.js'
import { readText as readTextFile } from './files.js'
import { listSome, loadSome, type StoredTensor } from './safetensors.js'
import type { Tensor } from './tensor.js'

/** @internal What a config may ask for: sizes beyond these are mistakes or attacks, not models. */
export const most = {
  sizes: 2 ** 20,
  layers: 1024,
  vocabulary: 2 ** 24,
  positions: 2 ** 24,
} as const

/** @internal A JSON file; ERR_IO, ERR_FORMAT. */
export async function readJson(path: string, op: string): Promise<unknown> {
  const text = await readText(path, op)
  try {
    return JSON.parse(text)
  } catch (cause) {
    refuse('ERR_FORMAT', op, `${path} is not JSON`, { cause })
  }
}

/** @internal A text file; ERR_IO. */
export async function readText(path: string, op: string): Promise<string> {
  try {
    return await readTextFile(path)
  } catch (cause) {
    refuse('ERR_IO', op, `${path} could not be read: ${(cause as Error).message}`, { cause })
  }
}

/** @internal What `read` gives, undefined where its file does not exist. */
export async function ifThere<T>(read: Promise<T>): Promise<T | undefined> {
  try {
    return await read
  } catch (error) {
    const missing =
      error instanceof P2RError && (error.cause as NodeJS.ErrnoException)?.code === 'ENOENT'
    if (missing) return undefined
    throw error
  }
}

/** @internal */
export interface LoadWeightsOptions<T extends Disposable> {
  /** As of loadSome. */
  keep: (name: string, tensor: Tensor) => T
  /** Called with the bytes read so far and those of all weights. */
  onProgress?: (done: number, of: number) => void
}

/**
 * @internal The weights of a folder to which `rename` gives a name, under that name: of the safetensors files that
 * model.safetensors.index.json names for them, else of all in the folder.
 */
export async function loadWeights<T extends Disposable>(
  op: string,
  folder: string,
  device: Device,
  rename: (name: string) => string | undefined,
  { keep, onProgress }: LoadWeightsOptions<T>,
): Promise<Record<string, T>> {
  const files = await weightFiles(folder, rename, op)
  const all = onProgress ? bytesOf(await listAll(op, files, rename)) : 0
  let done = 0
  const onBytes = (count: number): void => {
    done += count
    onProgress?.(done, all)
  }
  const weights: Record<string, T> = {}
  try {
    for (const file of files)
      for (const [name, tensor] of Object.entries(
        await loadSome(op, file, device, rename, { keep, onBytes }),
      )) {
        weights[name]?.[Symbol.dispose]()
        weights[name] = tensor
      }
    return weights
  } catch (error) {
    for (const weight of Object.values(weights)) weight[Symbol.dispose]()
    throw error
  }
}

/** @internal What loadWeights would load, without the data. */
export async function listWeights(
  op: string,
  folder: string,
  rename: (name: string) => string | undefined,
): Promise<StoredTensor[]> {
  return listAll(op, await weightFiles(folder, rename, op), rename)
}

/** @internal */
export function bytesOf(stored: readonly StoredTensor[]): number {
  return stored.reduce((sum, { bytes }) => sum + bytes, 0)
}

async function listAll(
  op: string,
  files: readonly string[],
  rename: (name: string) => string | undefined,
): Promise<StoredTensor[]> {
  return (await Promise.all(files.map((file) => listSome(op, file, rename)))).flat()
}

async function weightFiles(
  folder: string,
  rename: (name: string) => string | undefined,
  op: string,
): Promise<string[]> {
  const index = join(folder, 'model.safetensors.index.json')
  const json = await ifThere(readJson(index, op))
  if (json === undefined) {
    const all = (await filesIn(folder, op)).filter((name) => name.endsWith('.safetensors')).sort()
    if (!all.length) refuse('ERR_IO', op, `${folder}: there is no safetensors file`)
    return all.map((name) => join(folder, name))
  }
  const map = isJsonObject(json) ? json.weight_map : undefined
  if (!isJsonObject(map) || !Object.values(map).every((file) => typeof file === 'string'))
    refuse('ERR_FORMAT', op, `${index}: weight_map must hold a file for each weight`)
  const files = new Set<string>()
  for (const [name, file] of Object.entries(map as Record<string, string>)) {
    // A name with a folder in it could lead anywhere on this machine.
    if (basename(file) !== file || /^\.*$|[\\/\0]/.test(file))
      refuse('ERR_FORMAT', op, `${index}: '${name}' must be in a file of the folder, got '${file}'`)
    if (rename(name) !== undefined) files.add(file)
  }
  return [...files].map((name) => join(folder, name))
}

async function filesIn(folder: string, op: string): Promise<string[]> {
  try {
    return await readdir(folder)
  } catch (cause) {
    refuse('ERR_IO', op, `${folder} could not be read: ${(cause as Error).message}`, { cause })
  }
}
