// Images, boxes and evidence, as a strict consumer calls them. It is compiled, never run.
import {
  type AbortSignalLike,
  type CollectEvidenceArgs,
  type Color,
  collectEvidence,
  cropResample,
  type Device,
  drawBoxes,
  type Evidence,
  type EvidenceBox,
  type EvidenceOptions,
  type EvidencePixelValuesOptions,
  type EvidenceSizes,
  encodeImage,
  type Filter,
  type Grid,
  loadImage,
  type Normalization,
  type NormalizePatchesArgs,
  normalizePatches,
  type ParseBoxesOptions,
  type PatchDType,
  type PixelBox,
  parseBoxes,
  pixelValues,
  type Region,
  saveImage,
  smartResize,
  type Tensor,
} from 'p2r-kernels'

const box: PixelBox = [0, 0, 64, 64]
const filter: Filter = 'lanczos'
const red: Color = [255, 0, 0]

export async function images(device: Device, signal: AbortSignalLike): Promise<Uint8Array> {
  const image: Tensor = await loadImage('a.png', device, { alpha: 'drop', signal })
  using drawn = drawBoxes({ image, boxes: [box], colors: [red], width: 3 })
  await saveImage(drawn, 'b.png')
  return encodeImage(drawn, { format: 'jpeg', quality: 75 })
}

export function patches(image: Tensor): readonly Grid[] {
  const { height, width } = smartResize(480, 640, { factor: 32, rules: 'transformers' })
  const [crop] = cropResample({ image, regions: [{ box, height, width }], filter })
  const regions: Region[] = [{ box, height: 64, width: 64, image: 1, overlay: false }]
  const sources = crop ? [image, crop] : [image]
  using all = pixelValues({ images: sources, regions, overlay: { boxes: [box] }, dtype: 'bf16' })
  using one = pixelValues({ image, regions: [{ box, height: 64, width: 64 }], mean: [0, 0, 0] })
  return [...all.gridThw, ...one.gridThw]
}

export function normalized(image: Tensor<'u8'>, how: Normalization): Tensor<'bf16'> {
  const bytes: PatchDType = 'u8'
  const regions: Region[] = [{ box, height: 64, width: 64 }]
  const { pixelValues: patches } = pixelValues({ image, regions, dtype: bytes })
  const a: NormalizePatchesArgs<'bf16'> = { patches, ...how, dtype: 'bf16' }
  return normalizePatches(a)
}

export function evidenceOf(image: Tensor<'u8'>, text: string): Tensor[] {
  const reading: ParseBoxesOptions = { rules: 'strict' }
  const boxes: EvidenceBox[] = parseBoxes(text, reading)
  const sizes: EvidenceSizes = { maxPixels: 1 << 20 }
  const options: EvidenceOptions = { padding: [0.1, 0.1], ...sizes }
  const a: CollectEvidenceArgs = { image, boxes, ...options }
  using evidence: Evidence = collectEvidence(a)
  const patches: EvidencePixelValuesOptions<'f16'> = { ...sizes, dtype: 'f16' }
  const made = evidence.pixelValues(patches)
  return evidence.hasEvidence ? [evidence.annotated, ...evidence.crops] : [made.pixelValues]
}
