// Sources of images, parts of files and units of boxes as a strict consumer uses them. It is compiled, never run.
import {
  type BlobLike,
  type Coordinates,
  collectEvidence,
  type Device,
  type Evidence,
  type EvidenceBox,
  type ImageSource,
  type LoadTensorsOptions,
  loadImage,
  loadTensors,
  type Tensor,
  type TrainedLogProbs,
  type UrlLike,
} from 'p2r-kernels'

export async function images(
  device: Device,
  blob: BlobLike,
  url: UrlLike,
): Promise<Tensor<'u8'>[]> {
  const sources: ImageSource[] = ['street.jpg', new Uint8Array(8), blob, url]
  return Promise.all(sources.map((source) => loadImage(source, device)))
}

export async function part(device: Device): Promise<Tensor | undefined> {
  const options: LoadTensorsOptions = { only: (name) => name.startsWith('visual.') }
  const { weight } = await loadTensors('model.safetensors', device, options)
  return weight
}

export function pixels(image: Tensor<'u8'>, boxes: readonly EvidenceBox[]): Evidence {
  const coordinates: Coordinates = 'absolute'
  return collectEvidence({ image, boxes, coordinates, rules: 'transformers' })
}

export const trained = (logProbs: Tensor<'f32'>): TrainedLogProbs => ({ logProbs, temperature: 1 })
