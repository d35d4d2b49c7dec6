/** A trained model as the files of the checkpoint that it was loaded from. */
import { mkdir, readdir, realpath, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { P2RError, refuse } from '../errors.js'
import { readBytes, replaceFile } from '../files.js'
import { textPrefix } from '../models/qwen3_vl/decoder.js'
import { towerPrefix } from '../models/qwen3_vl/record.js'
import { rewriteTensors } from '../safetensors.js'
import type { Tensor } from '../tensor.js'

/** A file that is no weights, at most: a tokenizer has some ten megabytes. */
const largest = 2 ** 30

/** Writes the source's files into a folder, with these weights in place of its own. */
export async function saveCheckpoint(
  op: string,
  source: string,
  folder: string,
  weights: ReadonlyMap<string, Tensor>,
): Promise<void> {
  try {
    await mkdir(folder, { recursive: true })
    if ((await realpath(folder)) === (await realpath(source)))
      refuse('ERR_VALUE', op, `${folder} is the checkpoint that the model was loaded from`)
    for (const name of (await readdir(source)).sort()) {
      const [from, to] = [join(source, name), join(folder, name)]
      if (!(await stat(from)).isFile()) continue
      if (name.endsWith('.safetensors'))
        await rewriteTensors(op, from, to, (stored) => weights.get(parameterName(stored, weights)))
      else await replaceFile(to, [await readBytes(from, largest)])
    }
  } catch (cause) {
    if (cause instanceof P2RError) throw cause
    refuse('ERR_IO', op, `${folder} could not be written: ${(cause as Error).message}`, { cause })
  }
}

/** A stored name, which may have other prefixes, as `parameters()` has it; a tied head is the embedding. */
function parameterName(stored: string, weights: ReadonlyMap<string, Tensor>): string {
  const name = stored.replace(/^(?:(?:base_model|model|language_model|module)\.)+/, '')
  const visual = 'visual.'
  if (name.startsWith(visual)) return towerPrefix + name.slice(visual.length)
  if (name !== 'lm_head.weight') return textPrefix + name
  return weights.has(name) ? name : `${textPrefix}embed_tokens.weight`
}
