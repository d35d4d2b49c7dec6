// Installs the peers beside the build, from their own package.json and lock. No install script runs:
// onnxruntime-node's would only fetch CUDA libraries, and its CPU library is in the package.
import { spawnSync } from 'node:child_process'
import { copyFileSync, existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = fileURLToPath(new URL('../../..', import.meta.url))
const source = join(root, 'bench/peers')
const folder = join(root, 'build/peers')

/** undefined if they are installed; the reason if they could not be. */
export function installPeers(): string | undefined {
  const lock = readFileSync(join(source, 'package-lock.json'), 'utf8')
  const stamp = join(folder, 'installed')
  if (existsSync(stamp) && readFileSync(stamp, 'utf8') === lock) return undefined
  mkdirSync(folder, { recursive: true })
  for (const name of ['package.json', 'package-lock.json'])
    copyFileSync(join(source, name), join(folder, name))
  const { status } = spawnSync('npm', ['ci', '--ignore-scripts', '--no-audit', '--no-fund'], {
    cwd: folder,
    env: { ...process.env, ONNXRUNTIME_NODE_INSTALL: 'skip' },
    encoding: 'utf8',
    timeout: 300_000,
    shell: process.platform === 'win32',
  })
  if (status !== 0)
    return 'The peers of bench/peers/package.json could not be installed from the npm registry.'
  writeFileSync(stamp, lock)
  return undefined
}

/** A module of the peers; throws where it is not installed or does not load. */
export function peerModule(name: string): unknown {
  return createRequire(join(folder, 'package.json'))(name)
}

export function peerVersion(name: string): string | undefined {
  try {
    const path = join(folder, 'node_modules', name, 'package.json')
    return JSON.parse(readFileSync(path, 'utf8')).version
  } catch {
    return undefined
  }
}
