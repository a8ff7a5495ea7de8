// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Base64} from "@openzeppelin/contracts/utils/Base64.sol";
import {AttributionLog} from "../src/AttributionLog.sol";
import {RFC6962} from "../src/RFC6962.sol";
import {Base} from "./Base.sol";
import {VM} from "./Vm.sol";

contract ProofChecker {
    function includes(bytes32 root, uint64 size, uint64 index, bytes32 leaf, bytes32[] calldata proof)
        external
        pure
        returns (bool)
    {
        return RFC6962.includes(root, size, index, leaf, proof);
    }
}

contract RFC6962Test is Base {
    ProofChecker internal checker = new ProofChecker();
    AttributionLog internal log = new AttributionLog();
    string internal json;

    /// @dev Every inclusion and consistency case of transparency-dev/merkle. They are not ours: tests/test_contracts.py
    /// puts them here where it is given them (OPENLORA_RFC6962_VECTORS).
    function test_public_vectors() public {
        string memory path = "cache/public/rfc6962.json";
        VM.skip(!VM.exists(path), "OPENLORA_RFC6962_VECTORS names no vectors.json");
        json = VM.readFile(path);
        string[] memory names = VM.parseJsonKeys(json, "$");
        uint256 inclusions = 0;
        uint256 consistencies = 0;
        for (uint256 i = 0; i < names.length; ++i) {
            bytes4 kind = bytes4(bytes(names[i]));
            if (kind == "incl") {
                checkInclusion(names[i]);
                ++inclusions;
            } else if (kind == "cons") {
                checkConsistency(names[i]);
                ++consistencies;
            }
        }
        require(inclusions >= 50 && consistencies >= 43, "vectors are missing");
    }

    function checkInclusion(string memory name) private view {
        (bool fits, bytes32 root) = hashAt(name, "root");
        (bool leafFits, bytes32 leaf) = hashAt(name, "leafHash");
        (bool proofFits, bytes32[] memory proof) = proofAt(name);
        uint256 size = VM.parseJsonUint(json, field(name, "treeSize"));
        uint256 index = VM.parseJsonUint(json, field(name, "leafIdx"));
        // What is not of the types' lengths can't even be asked.
        bool valid = fits && leafFits && proofFits && size <= type(uint64).max && index <= type(uint64).max
            && checker.includes(root, uint64(size), uint64(index), leaf, proof);
        require(valid != VM.parseJsonBool(json, field(name, "wantErr")), name);
    }

    function checkConsistency(string memory name) private view {
        (bool fits, bytes32 root1) = hashAt(name, "root1");
        (bool fits2, bytes32 root2) = hashAt(name, "root2");
        (bool proofFits, bytes32[] memory proof) = proofAt(name);
        uint64 size1 = uint64(VM.parseJsonUint(json, field(name, "size1")));
        uint64 size2 = uint64(VM.parseJsonUint(json, field(name, "size2")));
        bool valid = fits && fits2 && proofFits && log.verifyConsistency(size1, root1, size2, root2, proof);
        require(valid != VM.parseJsonBool(json, field(name, "wantErr")), name);
    }

    /// @dev Trees of 1 to 20 leaves, by the definition: every proof verifies, and for no other place, size or leaf.
    function test_every_proof_of_small_trees() public view {
        for (uint64 size = 1; size <= 20; ++size) {
            bytes32 root = rootOf(0, size);
            for (uint64 index = 0; index < size; ++index) {
                bytes32[] memory proof = path(index, 0, size);
                assertTrue(log.verifyInclusion(root, size, index, leafAt(index), proof));
                assertTrue(!log.verifyInclusion(root, size, (index + 1) % size, leafAt(index), proof) || size == 1);
                assertTrue(!log.verifyInclusion(root, size, index, leafAt(index + 1), proof));
                assertTrue(!log.verifyInclusion(root, size, size, leafAt(index), proof));
            }
            for (uint64 size2 = size; size2 <= 20; ++size2) {
                bytes32[] memory proof = size == size2 ? new bytes32[](0) : subproof(size, 0, size2, true);
                assertTrue(log.verifyConsistency(size, root, size2, rootOf(0, size2), proof));
                assertTrue(!log.verifyConsistency(size2 + 1, root, size2, rootOf(0, size2), proof));
                assertTrue(!log.verifyConsistency(size, keccak256("x"), size2, rootOf(0, size2), proof));
            }
        }
    }

    function test_internal_node_is_no_leaf() public view {
        bytes memory node = abi.encodePacked(leafHashAt(0), leafHashAt(1)); // 64 bytes: the root of 2 leaves
        assertTrue(!log.verifyInclusion(rootOf(0, 2), 1, 0, node, new bytes32[](0)));
    }

    function test_proof_too_long_or_short() public view {
        bytes32[] memory proof = path(2, 0, 4);
        bytes32[] memory longer = new bytes32[](3);
        (longer[0], longer[1]) = (proof[0], proof[1]);
        bytes32[] memory shorter = new bytes32[](1);
        shorter[0] = proof[0];
        assertTrue(log.verifyInclusion(rootOf(0, 4), 4, 2, leafAt(2), proof));
        assertTrue(!log.verifyInclusion(rootOf(0, 4), 4, 2, leafAt(2), longer));
        assertTrue(!log.verifyInclusion(rootOf(0, 4), 4, 2, leafAt(2), shorter));
        assertTrue(!log.verifyInclusion(rootOf(0, 4), 4, 2, leafAt(2), new bytes32[](10000)));
        assertTrue(!log.verifyConsistency(2, rootOf(0, 2), 4, rootOf(0, 4), new bytes32[](10000)));
    }

    function test_empty_tree_proves_nothing() public view {
        assertTrue(!log.verifyInclusion(sha256(""), 0, 0, "", new bytes32[](0)));
        assertTrue(!log.verifyConsistency(0, sha256(""), 4, rootOf(0, 4), new bytes32[](0)));
        assertTrue(!log.verifyConsistency(0, sha256(""), 0, sha256(""), new bytes32[](0)));
    }

    function testFuzz_no_other_proof(uint64 size1, uint64 size2, bytes32 root, bytes32[] calldata proof) public view {
        VM.assume(size1 > 0 && size1 < size2);
        assertTrue(!log.verifyConsistency(size1, root, size2, keccak256(abi.encode(root)), proof));
        assertTrue(!log.verifyInclusion(root, size2, size1, abi.encode(root), proof));
    }

    function leafAt(uint64 index) private pure returns (bytes memory) {
        return abi.encode("leaf", index);
    }

    function leafHashAt(uint64 index) private pure returns (bytes32) {
        return sha256(bytes.concat(hex"00", leafAt(index)));
    }

    // RFC 6962, 2.1: the definitions, with the largest power of two below the size.
    function rootOf(uint64 from, uint64 to) private pure returns (bytes32) {
        if (to - from == 1) return leafHashAt(from);
        uint64 middle = from + split(to - from);
        return sha256(abi.encodePacked(hex"01", rootOf(from, middle), rootOf(middle, to)));
    }

    function path(uint64 index, uint64 from, uint64 to) private pure returns (bytes32[] memory) {
        if (to - from == 1) return new bytes32[](0);
        uint64 middle = from + split(to - from);
        return from + index < middle
            ? append(path(index, from, middle), rootOf(middle, to))
            : append(path(index - (middle - from), middle, to), rootOf(from, middle));
    }

    function subproof(uint64 size, uint64 from, uint64 to, bool whole) private pure returns (bytes32[] memory) {
        if (size == to - from) return whole ? new bytes32[](0) : append(new bytes32[](0), rootOf(from, to));
        uint64 middle = from + split(to - from);
        return from + size <= middle
            ? append(subproof(size, from, middle, whole), rootOf(middle, to))
            : append(subproof(size - (middle - from), middle, to, false), rootOf(from, middle));
    }

    function split(uint64 size) private pure returns (uint64 power) {
        for (power = 1; power * 2 < size;) {
            power *= 2;
        }
    }

    function append(bytes32[] memory hashes, bytes32 hash) private pure returns (bytes32[] memory longer) {
        longer = new bytes32[](hashes.length + 1);
        for (uint256 i = 0; i < hashes.length; ++i) {
            longer[i] = hashes[i];
        }
        longer[hashes.length] = hash;
    }

    function field(string memory name, string memory key) private pure returns (string memory) {
        return string.concat("$['", name, "'].", key);
    }

    function hashAt(string memory name, string memory key) private view returns (bool fits, bytes32 hash) {
        return hashOf(VM.parseJsonString(json, field(name, key)));
    }

    function hashOf(string memory text) private pure returns (bool fits, bytes32 hash) {
        bytes memory decoded = Base64.decode(text);
        return (decoded.length == 32, bytes32(decoded));
    }

    function proofAt(string memory name) private view returns (bool fits, bytes32[] memory proof) {
        fits = true;
        try VM.parseJsonStringArray(json, field(name, "proof")) returns (string[] memory texts) {
            proof = new bytes32[](texts.length);
            for (uint256 i = 0; i < texts.length; ++i) {
                bool one;
                (one, proof[i]) = hashOf(texts[i]);
                fits = fits && one;
            }
        } catch {} // null: no hashes
    }
}
