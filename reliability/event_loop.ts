// How long timers wait while the library works: nothing that takes long may run on the thread of JavaScript.
import { monitorEventLoopDelay } from 'node:perf_hooks'
import { encodeImage, linear, loadImage, openDevice } from 'p2r-kernels'
import sharp from 'sharp'

export interface Delay {
  name: string
  seconds: number
  /** The longest that the event loop did not turn, in milliseconds. */
  longest: number
}

async function during(name: string, f: () => Promise<unknown>): Promise<Delay> {
  const monitor = monitorEventLoopDelay({ resolution: 1 })
  await new Promise((resolve) => setTimeout(resolve, 30))
  monitor.enable()
  const started = performance.now()
  await f()
  const seconds = (performance.now() - started) / 1000
  await new Promise((resolve) => setTimeout(resolve, 5))
  monitor.disable()
  return { name, seconds, longest: monitor.max / 1e6 }
}

/** `scale` 1: a kernel of about 4 seconds on two cores, and images of 67 megapixels. */
export async function eventLoopDelays(scale: number): Promise<Delay[]> {
  const device = openDevice('cpu')
  const n = Math.round(7000 * Math.cbrt(scale))
  const x = device.zeros([n, n])
  const out: Delay[] = []
  out.push(
    await during('one long kernel, and its synchronize()', async () => {
      linear({ x, weight: x }).dispose()
      await device.synchronize()
    }),
  ) // prettier-ignore
  x.dispose()
  const side = Math.round(8192 * Math.sqrt(scale))
  for (const [channels, name] of [
    [3, 'RGB'],
    [4, 'RGBA'],
  ] as const) {
    const background = channels === 4 ? '#12345678' : '#123456'
    const png = await sharp({ create: { width: side, height: side, channels, background } })
      .png()
      .toBuffer()
    out.push(
      await during(`loadImage of ${Math.round(side ** 2 / 1e6)} megapixels, ${name}`, async () => {
        ;(await loadImage(png, device)).dispose()
      }),
    ) // prettier-ignore
  }
  const image = device.zeros([side, side, 3], 'u8')
  out.push(
    await during(`encodeImage of ${Math.round(side ** 2 / 1e6)} megapixels`, () =>
      encodeImage(image),
    ),
  )
  device.dispose()
  return out
}
