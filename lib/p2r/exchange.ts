import { checkString, describeValue } from '../arguments.js'
import { checkDevice, type Device } from '../device.js'
import { P2RError, refuse } from '../errors.js'
import { loadMetadata, loadTensors, saveTensors } from '../safetensors.js'
import type { Tensor } from '../tensor.js'
import { checkBatch, type RolloutBatch, type RolloutItem, Rollouts } from './rollouts.js'

// A batch as a safetensors file, for trainers in any language: numbers are tensors, the rest is JSON in
// the header.
const format = 'p2r-rollouts'
const version = '1'

/**
 * Writes a batch into a safetensors file, for trainers in any language.
 *
 * It holds `rewards` and `advantages` f32 [B], `groups` i32 [B], and where
 * the batch has them `tokens` i32 [T], `cu_seqlens` i32 [B + 1] and `old_log_probs` f32 [T]. The header
 * holds the role, the metrics, the temperatures and the items, without images. The file is replaced atomically.
 *
 * @throws P2RError ERR_VALUE for wrong arguments; ERR_IO, with its cause, when the file cannot be written.
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
export async function saveRollouts(path: string, batch: RolloutBatch): Promise<void> {
  const op = 'saveRollouts'
  checkString(path, 'path', op)
  checkBatch(batch, op)
  const { role, groups, rewards, advantages, cuSeqlens, tokens, oldLogProbs, metrics } = batch
  const { temperature, oldLogProbsTemperature } = batch
  const made: Tensor[] = []
  const ints = (data: Int32Array): Tensor => {
    const tensor = rewards.device.tensor(data, [data.length])
    made.push(tensor)
    return tensor
  }
  const items = batch.items.map(({ evidence, error, reward, ...item }) => ({
    ...item,
    ...(evidence && { boxes: evidence.boxes }),
    ...(error ? { error: error.message } : { reward }),
  }))
  const written = saveTensors(
    path,
    {
      rewards,
      advantages,
      groups: ints(groups),
      ...(tokens && { tokens: ints(tokens) }),
      ...(cuSeqlens && { cu_seqlens: ints(cuSeqlens) }),
      ...(oldLogProbs && { old_log_probs: oldLogProbs }),
    },
    {
      format,
      version,
      role,
      metrics: JSON.stringify(metrics),
      items: JSON.stringify(items),
      sampling: JSON.stringify({ temperature, oldLogProbsTemperature }),
    },
  )
  // The reads are queued already and keep the storage alive.
  for (const tensor of made) tensor.dispose()
  await written
}

/**
 * A batch that saveRollouts wrote, for PraGrpo's `step` in another process. Its items have no evidence:
 * the images are not in the file, the boxes are (`parseBoxes` of a perceiver's completion).
 *
 * @throws P2RError ERR_VALUE for wrong arguments; ERR_IO for a file that cannot be read; ERR_FORMAT for one that holds no
 *   batch.
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
export async function loadRollouts(path: string, device: Device): Promise<RolloutBatch> {
  const op = 'loadRollouts'
  checkString(path, 'path', op)
  checkDevice(device, op)
  const header = await loadMetadata(path)
  const bad = (why: string, cause?: unknown): never =>
    refuse('ERR_FORMAT', op, `${path}: ${why}`, { cause })
  if (header.format !== format || header.version !== version)
    bad(`expected a file of ${format} ${version}, got ${describeValue(header.format)}`)
  const { role } = header
  if (role !== 'perceiver' && role !== 'reasoner')
    return bad(`the role must be perceiver or reasoner, got ${describeValue(role)}`)
  const tensors = await loadTensors(path, device)
  try {
    const { rewards, advantages, old_log_probs: oldLogProbs } = tensors
    const ints = async (name: string): Promise<Int32Array | undefined> =>
      tensors[name]?.dtype === 'i32' ? ((await tensors[name].read()) as Int32Array) : undefined
    const [groups, tokens, cuSeqlens] = [
      await ints('groups'),
      await ints('tokens'),
      await ints('cu_seqlens'),
    ]
    if (!rewards || !advantages || !groups || rewards.size !== groups.length)
      return bad('rewards, advantages and groups of one length are needed')
    if (!!tokens !== !!cuSeqlens || (cuSeqlens && cuSeqlens.length !== groups.length + 1))
      bad('tokens and cu_seqlens must come together')
    for (const name of ['groups', 'tokens', 'cu_seqlens']) tensors[name]?.dispose()
    return new Rollouts({
      role,
      items: itemsOf(header.items, bad),
      groups,
      rewards,
      advantages,
      metrics: JSON.parse(header.metrics ?? 'null'),
      ...samplingOf(header.sampling, bad),
      ...(tokens && cuSeqlens && { tokens, cuSeqlens }),
      ...(oldLogProbs && { oldLogProbs }),
    })
  } catch (error) {
    for (const tensor of Object.values(tensors)) tensor.dispose()
    if (error instanceof P2RError) throw error
    return bad('its header does not describe a batch', error)
  }
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

function itemsOf(text: string | undefined, bad: (why: string) => never): RolloutItem[] {
  const items: unknown = JSON.parse(text ?? 'null')
  if (!Array.isArray(items)) return bad('its header has no items')
  return items.map(({ boxes: _, error, reward, ...item }) => ({
    ...item,
    ...(error === undefined
      ? { reward }
      : { error: new P2RError('ERR_POLICY', error, { op: 'rollout' }), reward: Number.NaN }),
  }))
}
