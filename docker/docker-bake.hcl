# Builds all images for all their platforms.
#
#   docker buildx bake -f docker/docker-bake.hcl
#   TAG=1 REGISTRY=registry.example/us docker buildx bake -f docker/docker-bake.hcl --push

variable "REGISTRY" { default = "localhost" }
variable "TAG" { default = "latest" }
variable "PYTHON_IMAGE" { default = "docker.io/library/python:3.11.14-slim-bookworm" }
variable "L4T_IMAGE" { default = "nvcr.io/nvidia/l4t-jetpack:r36.4.0" }

group "default" {
  targets = ["device", "basestation", "basestation-cpu", "export"]
}

target "python" {
  args = { PYTHON_IMAGE = PYTHON_IMAGE }
}

target "device" {
  inherits   = ["python"]
  dockerfile = "docker/device.Dockerfile"
  platforms  = ["linux/arm64", "linux/amd64"]
  tags       = ["${REGISTRY}/edgedraft-device:${TAG}"]
}

target "device-jetson" {
  dockerfile = "docker/device-jetson.Dockerfile"
  args       = { L4T_IMAGE = L4T_IMAGE }
  platforms  = ["linux/arm64"]
  tags       = ["${REGISTRY}/edgedraft-device-jetson:${TAG}"]
}

target "basestation" {
  inherits   = ["python"]
  dockerfile = "docker/basestation.Dockerfile"
  platforms  = ["linux/amd64"]
  tags       = ["${REGISTRY}/edgedraft-basestation:${TAG}"]
}

target "basestation-cpu" {
  inherits   = ["python"]
  dockerfile = "docker/basestation.Dockerfile"
  args       = { TORCH = "cpu" }
  platforms  = ["linux/amd64", "linux/arm64"]
  tags       = ["${REGISTRY}/edgedraft-basestation:${TAG}-cpu"]
}

target "export" {
  inherits   = ["python"]
  dockerfile = "docker/export.Dockerfile"
  platforms  = ["linux/amd64"]
  tags       = ["${REGISTRY}/edgedraft-export:${TAG}"]
}
