import { basename, resolve } from 'node:path'
import { openDevice } from '../device.js'
import { type ServeOptions, serveModel } from '../serve/server.js'
import { type LoadOptions, loadModel } from './roles.js'

export interface ServeCommandOptions
  extends LoadOptions,
    Required<Pick<ServeOptions, 'host' | 'port' | 'maxTokens'>> {
  model: string
  name?: string
  apiKey?: string
  logprobsMode: NonNullable<ServeOptions['logProbsMode']>
  device?: string
}

/** Serves a model until it is told to stop; returns the exit code. */
export async function serveCommand(options: ServeCommandOptions): Promise<number> {
  const { host, port, maxTokens, logprobsMode: logProbsMode } = options
  using device = openDevice(options.device)
  using model = await loadModel(options.model, device, options)
  const name = options.name ?? basename(resolve(options.model))
  const apiKey = options.apiKey ?? process.env.P2R_API_KEY
  const settings = { name, host, port, maxTokens, logProbsMode, ...(apiKey && { apiKey }) }
  const server = await serveModel(model, settings)
  console.error(`${name} is served at ${server.baseURL}, on ${device}. Ctrl-C ends it.`)
  await new Promise<void>((resolve) => {
    for (const signal of ['SIGINT', 'SIGTERM'] as const)
      process.on(signal, () => {
        // A second one does not wait for the requests under way.
        process.once(signal, () => process.exit(130))
        resolve()
      })
  })
  await server.close()
  return 0
}
