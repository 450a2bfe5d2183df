# Builds all images.
#
#   docker buildx bake -f docker/docker-bake.hcl
#   TAG=1 REGISTRY=registry.example/us docker buildx bake -f docker/docker-bake.hcl --push
#
# Docker's default builder builds for its own platform. For others, emulated, it needs a builder that can:
#
#   docker buildx create --use
#   DEVICE_PLATFORMS=linux/arm64,linux/amd64 docker buildx bake -f docker/docker-bake.hcl device --push

variable "REGISTRY" { default = "localhost" }
variable "TAG" { default = "latest" }
variable "REVISION" { default = "unknown" }
variable "DEVICE_PLATFORMS" { default = "" }
variable "PYTHON_IMAGE" { default = "docker.io/library/python:3.11.14-slim-bookworm" }
variable "CUDA_IMAGE" { default = "nvcr.io/nvidia/cuda:13.2.1-cudnn-runtime-ubuntu24.04" }
variable "PIP_INDEX_URL" { default = null }
variable "TORCH_INDEX" { default = null }
variable "ONNXRUNTIME" { default = null }
variable "COMPUTE_CAPABILITY" { default = null }

group "default" {
  targets = ["device", "basestation", "basestation-cpu", "export"]
}

target "common" {
  args = {
    REVISION      = REVISION
    PIP_INDEX_URL = PIP_INDEX_URL
  }
}

target "python" {
  inherits = ["common"]
  args     = { PYTHON_IMAGE = PYTHON_IMAGE }
}

target "device" {
  inherits   = ["python"]
  dockerfile = "docker/device.Dockerfile"
  platforms  = DEVICE_PLATFORMS == "" ? [] : split(",", DEVICE_PLATFORMS)
  tags       = ["${REGISTRY}/edgedraft-device:${TAG}"]
}

target "device-jetson" {
  inherits   = ["common"]
  dockerfile = "docker/device-jetson.Dockerfile"
  args       = { CUDA_IMAGE = CUDA_IMAGE, ONNXRUNTIME = ONNXRUNTIME, COMPUTE_CAPABILITY = COMPUTE_CAPABILITY }
  platforms  = ["linux/arm64"]
  tags       = ["${REGISTRY}/edgedraft-device-jetson:${TAG}"]
}

target "basestation" {
  inherits   = ["python"]
  dockerfile = "docker/basestation.Dockerfile"
  args       = { TORCH = "cuda" }
  platforms  = ["linux/amd64"]
  tags       = ["${REGISTRY}/edgedraft-basestation:${TAG}-cuda"]
}

target "basestation-cpu" {
  inherits   = ["python"]
  dockerfile = "docker/basestation.Dockerfile"
  args       = { TORCH = "cpu", TORCH_INDEX = TORCH_INDEX }
  platforms  = ["linux/amd64"]
  tags       = ["${REGISTRY}/edgedraft-basestation:${TAG}-cpu"]
}

target "export" {
  inherits   = ["python"]
  dockerfile = "docker/export.Dockerfile"
  args       = { TORCH_INDEX = TORCH_INDEX }
  platforms  = ["linux/amd64"]
  tags       = ["${REGISTRY}/edgedraft-export:${TAG}"]
}
