// A whole model as a strict consumer uses it. It is compiled, never run.
import {
  type Device,
  Qwen3VL,
  type Qwen3VLConfig,
  type Qwen3VLOptions,
  type Qwen3VLSampling,
} from 'p2r-kernels'

export async function load(folder: string, device: Device): Promise<number> {
  const options: Qwen3VLOptions = { dtype: 'bf16', onProgress: (done, of) => void (done / of) }
  using model = await Qwen3VL.load(folder, device, options)
  const config: Qwen3VLConfig = model.config
  const sampling: Qwen3VLSampling = model.sampling
  const [first]: readonly number[] = sampling.stopTokens
  return first ?? config.vocabSize
}
