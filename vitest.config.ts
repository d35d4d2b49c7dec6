import { fileURLToPath } from 'node:url'
import { defineConfig } from 'vitest/config'

const at = (path: string): string => fileURLToPath(new URL(path, import.meta.url))

// Tests use the built package, as its users do.
const shared = {
  resolve: { alias: { 'p2r-kernels': at('./dist/lib/index.js') } },
  test: {
    pool: 'forks' as const,
    maxWorkers: 2,
    maxConcurrency: 2,
    testTimeout: 60_000,
    server: { deps: { external: [/\/dist\//] } },
  },
}

export default defineConfig({
  test: {
    globalSetup: './test/global_setup.ts',
    projects: [
      {
        ...shared,
        test: {
          ...shared.test,
          name: 'package',
          include: ['test/*.test.ts'],
          exclude: ['test/twin.test.ts'],
          sequence: { groupOrder: 0 },
        },
      },
      // Last: it runs the cases that the operations' tests recorded.
      {
        ...shared,
        test: {
          ...shared.test,
          name: 'twin',
          include: ['test/twin.test.ts'],
          sequence: { groupOrder: 1 },
        },
      },
    ],
  },
})
