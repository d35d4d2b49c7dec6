import { createHash } from 'node:crypto'
import { mkdir } from 'node:fs/promises'
import { basename, dirname, isAbsolute, join } from 'node:path'
import {
  checkArguments,
  checkBoolean,
  checkString,
  choice,
  describeValue,
  isJsonObject,
  isObject,
  type Names,
} from '../arguments.js'
import { checkDevice, type Device } from '../device.js'
import type { DType } from '../dtype.js'
import { P2RError, refuse } from '../errors.js'
import { loadImage, saveImage } from '../image.js'
import { loadMetadata, loadTensors, saveTensors } from '../safetensors.js'
import type { Tensor } from '../tensor.js'
import { type Completion, savedCompletion, wrongIn } from './policy.js'
import {
  AskedRequest,
  checkBatch,
  type RequestImages,
  type RolloutBatch,
  type RolloutItem,
  type RolloutMetrics,
  type RolloutRequest,
  Rollouts,
  type StoredImage,
} from './rollouts.js'

// A batch as a safetensors file, for trainers in any language: numbers are tensors, the rest is JSON in
// the header.
const format = 'p2r-rollouts'
const version = '1'

/** Options of saveRollouts. */
export interface SaveRolloutsOptions {
  /**
   * What becomes of the requests' images: 'hashes' records their SHA-256 and sizes, 'files' also writes them as
   * PNG into a folder beside the batch's file, named after it with `.images`, where equal images are one file.
   * @default 'hashes'
   */
  images?: 'hashes' | 'files'
}

/** Options of loadRollouts. */
export interface LoadRolloutsOptions {
  /**
   * Whether the requests' images are loaded, where they were saved as files.
   * @default true
   */
  images?: boolean
}

const saveNames: Names<SaveRolloutsOptions> = { images: true }
const loadNames: Names<LoadRolloutsOptions> = { images: true }

/**
 * Writes a batch into a safetensors file, for trainers in any language.
 *
 * It holds `rewards` and `advantages` f32 [B], `groups` i32 [B], and where
 * the batch has them `tokens` i32 [T], `cu_seqlens` i32 [B + 1], `mask` u8 [T] and `old_log_probs` f32 [T]. The header
 * holds the role, the metrics, the temperatures, the items, and the requests, to which an item's `request` is the index:
 * the prompts, their token ids where they are known, and the images' hashes. The file is replaced atomically.
 *
 * @throws P2RError ERR_VALUE for wrong arguments; ERR_DISPOSED where a sample's image was disposed; ERR_IO, with its cause,
 *   when a file cannot be written.
 * @example
 * ```js
 * import { mkdtempSync } from 'node:fs'
 * import { tmpdir } from 'node:os'
 * import { join } from 'node:path'
 * import { functionPolicy, loadMetadata, openDevice, PraGrpo, saveRollouts } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const trainer = new PraGrpo({
 *   perceiver: functionPolicy(() => ({ text: '[]', tokens: [1, 2], logProbs: [-0.5, -0.5] })),
 *   reasoner: functionPolicy(() => '<answer>B</answer>'),
 *   device,
 * })
 * const image = device.zeros([48, 64, 3], 'u8')
 * const batch = await trainer.rollout([{ image, question: 'Which?', answerForm: 'mca', truth: 'B' }])
 * const path = join(mkdtempSync(join(tmpdir(), 'p2r-')), 'batch.safetensors')
 * await saveRollouts(path, batch)
 * console.log((await loadMetadata(path)).role) // perceiver
 * batch.dispose()
 * device.dispose()
 * ```
 */
export async function saveRollouts(
  path: string,
  batch: RolloutBatch,
  options: SaveRolloutsOptions = {},
): Promise<void> {
  const op = 'saveRollouts'
  checkString(path, 'path', op)
  checkBatch(batch, op)
  options = checkArguments(options, saveNames, op)
  const files = choice(options.images ?? 'hashes', ['hashes', 'files'], 'images', op) === 'files'
  const { role, groups, rewards, advantages, cuSeqlens, tokens, oldLogProbs, metrics } = batch
  const { temperature, oldLogProbsTemperature, mask } = batch
  const made: Tensor[] = []
  const ints = (data: Int32Array): Tensor => {
    const tensor = rewards.device.tensor(data, [data.length])
    made.push(tensor)
    return tensor
  }
  const requests = [...new Set(batch.items.flatMap(({ request }) => request ?? []))]
  const items = batch.items.map(({ evidence, error, reward, request, completion, ...item }) => {
    // The request has the prompt's tokens, once for all of its completions.
    const { promptTokens, ...said } = completion
    return {
      ...item,
      completion: request?.promptTokens ? said : completion,
      ...(request && { request: requests.indexOf(request) }),
      ...(evidence && { boxes: evidence.boxes }),
      ...(error ? { error: error.message } : { reward }),
    }
  })
  const stored = await storeImages(path, requests, files)
  const written = saveTensors(
    path,
    {
      rewards,
      advantages,
      groups: ints(groups),
      ...(tokens && { tokens: ints(tokens) }),
      ...(cuSeqlens && { cu_seqlens: ints(cuSeqlens) }),
      ...(mask && { mask }),
      ...(oldLogProbs && { old_log_probs: oldLogProbs }),
    },
    {
      format,
      version,
      role,
      metrics: JSON.stringify(metrics),
      items: JSON.stringify(items),
      requests: JSON.stringify(
        requests.map(({ system, prompt, promptTokens }, i) => ({
          system,
          prompt,
          ...(promptTokens && { promptTokens }),
          images: stored[i],
        })),
      ),
      sampling: JSON.stringify({ temperature, oldLogProbsTemperature }),
    },
  )
  // The reads are queued already and keep the storage alive.
  for (const tensor of made) tensor.dispose()
  await written
}

/** Hashes the images of each request, one request after the other, so that few are in memory; writes them as files. */
async function storeImages(
  path: string,
  requests: readonly RolloutRequest[],
  files: boolean,
): Promise<StoredImage[][]> {
  const folder = `${basename(path)}.images`
  const all: StoredImage[][] = []
  const written = new Set<string>()
  const store = async (image: Tensor<'u8'>): Promise<StoredImage> => {
    const [height, width] = image.shape as readonly [number, number, number]
    const sha256 = hashOf(await image.read())
    if (!files) return { sha256, height, width }
    const file = `${folder}/${sha256}.png`
    if (!written.has(file)) await saveImage(image, join(dirname(path), file))
    written.add(file)
    return { sha256, height, width, file }
  }
  if (files && requests.length) await makeFolder(join(dirname(path), folder))
  for (const request of requests) {
    const storeEach = async (images: readonly Tensor<'u8'>[]): Promise<StoredImage[]> => {
      const made: StoredImage[] = []
      for (const image of images) made.push(await store(image))
      return made
    }
    // A loaded batch may have no images, but their hashes.
    if (request.stored && !files) all.push(request.stored.map(({ file: _, ...image }) => image))
    else if (request instanceof AskedRequest) all.push(await request.withImages(storeEach))
    else all.push(await storeEach(request.images))
  }
  return all
}

async function makeFolder(folder: string): Promise<void> {
  try {
    await mkdir(folder, { recursive: true })
  } catch (cause) {
    refuse('ERR_IO', 'saveRollouts', `${folder} could not be made`, { cause })
  }
}

function hashOf(pixels: Uint8Array): string {
  return createHash('sha256').update(pixels).digest('hex')
}

/**
 * A batch that saveRollouts wrote, for PraGrpo's `step` in another process. Its items have no evidence, but its
 * boxes are in the file, and in a perceiver's completion (`parseBoxes`). Their requests have images where these were
 * saved as files, each compared with its hash.
 *
 * @throws P2RError ERR_VALUE for wrong arguments; ERR_IO for a file that cannot be read; ERR_FORMAT for one that holds no
 *   batch, and for an image that is not the one that was saved.
 * @example
 * ```js
 * import { mkdtempSync } from 'node:fs'
 * import { tmpdir } from 'node:os'
 * import { join } from 'node:path'
 * import { functionPolicy, loadRollouts, openDevice, PraGrpo, saveRollouts } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const options = {
 *   perceiver: functionPolicy(() => ({ text: '[]', tokens: [1, 2], logProbs: [-0.5, -0.5] })),
 *   reasoner: functionPolicy(() => '<answer>B</answer>'),
 *   device,
 *   groupSize: 4,
 * }
 * const image = device.zeros([48, 64, 3], 'u8')
 * const path = join(mkdtempSync(join(tmpdir(), 'p2r-')), 'batch.safetensors')
 * const batch = await new PraGrpo(options).rollout([
 *   { image, question: 'Which?', answerForm: 'mca', truth: 'B' },
 * ])
 * await saveRollouts(path, batch)
 *
 * // In another process:
 * const loaded = await loadRollouts(path, device)
 * const logProbs = device.tensor(new Float32Array(8).fill(-0.5), [8]) // the trained model's
 * const step = new PraGrpo(options).step(loaded, { logProbs })
 * console.log(loaded.tokens?.length, step.dLogProbs.shape) // 8 [8]
 * for (const each of [step, loaded, batch]) each.dispose()
 * device.dispose()
 * ```
 */
export async function loadRollouts(
  path: string,
  device: Device,
  options: LoadRolloutsOptions = {},
): Promise<RolloutBatch> {
  const op = 'loadRollouts'
  checkString(path, 'path', op)
  checkDevice(device, op)
  options = checkArguments(options, loadNames, op)
  const withImages = checkBoolean(options.images ?? true, 'images', op)
  const header = await loadMetadata(path)
  const bad = (why: string, cause?: unknown): never =>
    refuse('ERR_FORMAT', op, `${path}: ${why}`, { cause })
  if (header.format !== format || header.version !== version)
    bad(`expected a file of ${format} ${version}, got ${describeValue(header.format)}`)
  const { role } = header
  if (role !== 'perceiver' && role !== 'reasoner')
    return bad(`the role must be perceiver or reasoner, got ${describeValue(role)}`)
  const tensors = await loadTensors(path, device)
  const loaded = new Map<string, Tensor<'u8'>>()
  try {
    const list = <T extends DType>(
      name: string,
      dtype: T,
      length?: number,
    ): Tensor<T> | undefined => {
      const tensor = tensors[name]
      if (!tensor) return undefined
      const { shape } = tensor
      if (tensor.dtype !== dtype || shape.length !== 1 || (length ?? shape[0]) !== shape[0])
        bad(
          `${name} must be ${dtype} [${length ?? 'n'}], got ${tensor.dtype} [${shape.join(', ')}]`,
        )
      return tensor as Tensor<T>
    }
    const ints = async (name: string, length?: number): Promise<Int32Array | undefined> =>
      list(name, 'i32', length)?.read()
    const groups = await ints('groups')
    const count = groups?.length
    const [rewards, advantages] = [list('rewards', 'f32', count), list('advantages', 'f32', count)]
    if (!groups || !rewards || !advantages) return bad('rewards, advantages and groups are needed')
    const tokens = await ints('tokens')
    const cuSeqlens = await ints('cu_seqlens', groups.length + 1)
    if (!!tokens !== !!cuSeqlens) bad('tokens and cu_seqlens must come together')
    if (tokens && cuSeqlens) checkSequences(tokens, cuSeqlens, bad)
    const [mask, oldLogProbs] = [
      list('mask', 'u8', tokens?.length ?? 0),
      list('old_log_probs', 'f32', tokens?.length ?? 0),
    ]
    if ((await mask?.read())?.some((kept) => kept > 1)) bad('the mask must hold 0 and 1')
    for (const name of ['groups', 'tokens', 'cu_seqlens']) tensors[name]?.dispose()
    const requests: AskedRequest[] = []
    for (const request of requestsOf(header.requests, bad)) {
      const { stored = [] } = request
      const there = withImages && stored.every(({ file }) => file !== undefined)
      if (there) for (const image of stored) await loadStored(path, image, device, loaded)
      requests.push(new AskedRequest(request, () => imagesOf(stored, there ? loaded : undefined)))
    }
    return new Rollouts(
      {
        role,
        items: itemsOf(header.items, requests, groups.length, bad),
        groups,
        rewards,
        advantages,
        metrics: metricsOf(header.metrics, bad),
        ...samplingOf(header.sampling, bad),
        ...(tokens && cuSeqlens && { tokens, cuSeqlens }),
        ...(mask && { mask }),
        ...(oldLogProbs && { oldLogProbs }),
      },
      [...loaded.values()],
    )
  } catch (error) {
    for (const tensor of [...Object.values(tensors), ...loaded.values()]) tensor.dispose()
    if (error instanceof P2RError) throw error
    return bad('its header does not describe a batch', error)
  }
}

/** The sequences cover the tokens, one after the other. */
function checkSequences(
  tokens: Int32Array,
  cuSeqlens: Int32Array,
  bad: (why: string) => never,
): void {
  const ascend = cuSeqlens.every((at, i) => (i === 0 ? at === 0 : at >= cuSeqlens[i - 1]!))
  if (!ascend || cuSeqlens.at(-1) !== tokens.length)
    bad(`cu_seqlens must ascend from 0 to the number of tokens, ${tokens.length}`)
  if (tokens.some((id) => id < 0)) bad('token ids must be at least 0')
}

/** Every number of a batch's metrics that this release knows, and no other kind of value. */
function metricsOf(text: string | undefined, bad: (why: string) => never): RolloutMetrics {
  const metrics: unknown = JSON.parse(text ?? 'null')
  const { faults, ...numbers } = (isJsonObject(metrics) ? metrics : {}) as Record<string, unknown>
  const isNumbers = (of: object): boolean =>
    Object.values(of).every((value) => typeof value === 'number')
  if (!isJsonObject(faults) || !isNumbers(faults) || !isNumbers(numbers))
    return bad('its metrics must be numbers by name')
  return metrics as RolloutMetrics
}

/** The temperatures of a batch; none in files of earlier releases. */
function samplingOf(
  text: string | undefined,
  bad: (why: string) => never,
): Pick<RolloutBatch, 'temperature' | 'oldLogProbsTemperature'> {
  const { temperature, oldLogProbsTemperature } = (JSON.parse(text ?? 'null') ?? {}) as Record<
    string,
    unknown
  >
  for (const value of [temperature, oldLogProbsTemperature])
    if (value !== undefined && !(typeof value === 'number' && value >= 0))
      return bad(`a temperature must be a number of at least 0, got ${describeValue(value)}`)
  return {
    ...(temperature !== undefined && { temperature: temperature as number }),
    ...(oldLogProbsTemperature !== undefined && {
      oldLogProbsTemperature: oldLogProbsTemperature as number,
    }),
  }
}

/** The requests of a batch; none in files of earlier releases. */
function requestsOf(
  text: string | undefined,
  bad: (why: string) => never,
): Omit<RolloutRequest, 'images'>[] {
  const requests: unknown = JSON.parse(text ?? '[]')
  if (!Array.isArray(requests)) return bad('its requests are no list')
  return requests.map((request) => {
    const { system, prompt, promptTokens, images } = (
      isJsonObject(request) ? request : {}
    ) as Record<string, unknown>
    const wrong = wrongIn({ text: '', promptTokens } as Completion)
    if (wrong !== undefined) bad(`a request has ${wrong}`)
    if (typeof system !== 'string' || typeof prompt !== 'string' || !Array.isArray(images))
      return bad(`a request must have system, prompt and images, got ${describeValue(request)}`)
    for (const image of images as unknown[]) {
      const { sha256, height, width, file } = (isObject(image) ? image : {}) as Partial<StoredImage>
      const isStored =
        typeof sha256 === 'string' &&
        [height, width].every((size) => Number.isSafeInteger(size) && (size as number) > 0)
      if (!isStored || (file !== undefined && !isInside(file)))
        bad(
          `an image must have its SHA-256, its sizes and a file beside the batch, got ${JSON.stringify(image)}`,
        )
    }
    return {
      system,
      prompt,
      ...(Array.isArray(promptTokens) && { promptTokens: promptTokens as number[] }),
      stored: images as StoredImage[],
    }
  })
}

/** Whether a path stays in the folder that it is relative to. */
function isInside(file: unknown): boolean {
  return typeof file === 'string' && !isAbsolute(file) && !file.split(/[\\/]/).includes('..')
}

/** Loads an image, unless another request did. */
async function loadStored(
  path: string,
  { sha256, file }: StoredImage,
  device: Device,
  loaded: Map<string, Tensor<'u8'>>,
): Promise<void> {
  if (loaded.has(sha256)) return
  const image = await loadImage(join(dirname(path), file!), device)
  loaded.set(sha256, image)
  if (hashOf(await image.read()) !== sha256)
    refuse('ERR_FORMAT', 'loadRollouts', `${file} is not the image that was saved`)
}

/** A request's images. They are the batch's, since requests may share an image. */
function imagesOf(
  stored: readonly StoredImage[],
  loaded: ReadonlyMap<string, Tensor<'u8'>> | undefined,
): RequestImages {
  if (!loaded)
    refuse(
      'ERR_VALUE',
      'request',
      "the batch has no images: save it with images 'files', and load it with images true",
    )
  return { images: stored.map(({ sha256 }) => loaded.get(sha256)!), [Symbol.dispose]() {} }
}

function itemsOf(
  text: string | undefined,
  requests: readonly AskedRequest[],
  rewarded: number,
  bad: (why: string) => never,
): RolloutItem[] {
  const list: unknown = JSON.parse(text ?? 'null')
  if (!Array.isArray(list)) return bad('its header has no items')
  const items = list.map((item) => itemOf(item, requests, bad))
  const without = items.filter(({ error }) => !error).length
  if (without !== rewarded) bad(`${without} items have no error, but there are ${rewarded} rewards`)
  return items
}

/** An item as it was saved; the request has the prompt's tokens. */
function itemOf(
  value: unknown,
  requests: readonly AskedRequest[],
  bad: (why: string) => never,
): RolloutItem {
  if (!isJsonObject(value)) return bad(`an item must be an object, got ${describeValue(value)}`)
  const { boxes: _, error, reward, request: at, completion, ...item } = value
  const { sample, fault, counterpart, answer, outOfTurns } = item
  const good =
    Number.isSafeInteger(sample) &&
    (at === undefined || (Number.isInteger(at) && requests[at as number] !== undefined)) &&
    (error === undefined ? typeof reward === 'number' : typeof error === 'string') &&
    (fault === undefined || fault === 'overlap' || fault === 'label') &&
    [counterpart, answer].every((text) => text === undefined || typeof text === 'string') &&
    (outOfTurns === undefined || typeof outOfTurns === 'boolean')
  if (!good)
    bad('an item must have a sample, a completion, a reward or an error, and one of its requests')
  const request = at === undefined ? undefined : requests[at as number]
  return {
    ...(item as Pick<RolloutItem, 'sample'>),
    completion: {
      ...savedCompletion(completion, bad),
      ...(request?.promptTokens && { promptTokens: request.promptTokens }),
    },
    ...(request && { request }),
    ...(error === undefined
      ? { reward: reward as number }
      : {
          error: new P2RError('ERR_POLICY', error as string, { op: 'rollout' }),
          reward: Number.NaN,
        }),
  }
}
