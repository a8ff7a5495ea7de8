// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {MerkleProof} from "@openzeppelin/contracts/utils/cryptography/MerkleProof.sol";
import {AdapterRegistry} from "../src/AdapterRegistry.sol";
import {AttributionLog} from "../src/AttributionLog.sol";
import {RewardDistributor} from "../src/RewardDistributor.sol";
import {RewardToken} from "../src/RewardToken.sol";
import {IAttributionLog} from "../src/interfaces/IAttributionLog.sol";
import {IRewardDistributor} from "../src/interfaces/IRewardDistributor.sol";
import {Base} from "./Base.sol";
import {RewardTree} from "./RewardTree.sol";
import {VM} from "./Vm.sol";

/// @dev The frozen golden vectors, which Python and JavaScript check too.
contract VectorsTest is Base {
    struct Receipt {
        uint16 schema;
        bytes32 logId;
        uint64 seq;
        bytes32 requestId;
        uint8 status;
        bytes32 baseModel;
        bytes32 runtimeHash;
        bytes32 adaptersHash;
        bytes32 termsHash;
        bytes32 registryRef;
        bytes32 promptCommit;
        bytes32 outputCommit;
        uint32 inTokens;
        uint32 outTokens;
        uint64 startedAt;
        uint64 endedAt;
        uint128 price;
        bytes32 paymentRef;
        bytes32 computeProof;
    }

    bytes32 private constant RECEIPT_TYPE_HASH = keccak256(
        "Receipt(uint16 schema,bytes32 logId,uint64 seq,bytes32 requestId,uint8 status,bytes32 baseModel,"
        "bytes32 runtimeHash,bytes32 adaptersHash,bytes32 termsHash,bytes32 registryRef,bytes32 promptCommit,"
        "bytes32 outputCommit,uint32 inTokens,uint32 outTokens,uint64 startedAt,uint64 endedAt,uint128 price,"
        "bytes32 paymentRef,bytes32 computeProof)"
    );

    string private json;
    AttributionLog private log;
    RewardToken private token;
    RewardDistributor private rewards;

    function test_receipt_leaf_digest_and_signature() public {
        json = VM.readFile("../tests/vectors/receipt_v1.json");
        Receipt memory receipt = receiptOf("$.expected.document");
        bytes memory leaf = abi.encode(receipt);
        assertEq(leaf.length, 608);
        assertEq(keccak256(leaf), keccak256(bytesAt("$.expected.leaf")));
        assertEq(sha256(bytes.concat(hex"00", leaf)), bytes32(bytesAt("$.expected.leaf_hash")));

        bytes32 domainTypeHash = keccak256("EIP712Domain(string name,string version,bytes32 salt)");
        bytes32 domain =
            keccak256(abi.encode(domainTypeHash, keccak256("OpenLoRA Receipt"), keccak256("1"), receipt.logId));
        // EIP-712 encodes atomic members as the ABI does.
        bytes32 structHash = keccak256(bytes.concat(RECEIPT_TYPE_HASH, leaf));
        bytes32 digest = keccak256(abi.encodePacked(hex"1901", domain, structHash));
        assertEq(digest, bytes32(bytesAt("$.expected.eip712_digest")));
        assertEq(signerOf(digest, bytesAt("$.expected.signature")), addressAt("$.expected.document.signer"));
    }

    function test_receipt_log_id() public {
        json = VM.readFile("../tests/vectors/receipt_v1.json");
        bytes memory words = bytesAt("$.expected.log_init_leaf");
        (
            uint16 schema,,
            bytes32 originHash,
            address signer,
            bytes32 checkpointKey,
            bytes32 nonce,
            bytes32 predecessor
        ) = abi.decode(words, (uint16, bytes32, bytes32, address, bytes32, bytes32, bytes32));
        assertEq(schema, 0x0301);
        IAttributionLog.LogInit memory init =
            IAttributionLog.LogInit(originHash, signer, checkpointKey, nonce, predecessor);
        assertEq(new AttributionLog().logIdOf(init), bytes32(bytesAt("$.expected.log_id")));
    }

    function test_settlement_log_ids_and_registrations() public {
        deployAll();
        assertEq(domainSeparator("OpenLoRA Log", address(log)), bytes32At("$.log_domain_separator"));
        for (uint256 i = 0; i < 2; ++i) {
            string memory one = string.concat("$.logs[", VM.toString(i), "]");
            bytes32 logId = bytes32At(string.concat(one, ".log_id"));
            assertEq(log.logIdOf(initAt(one)), logId);
            bytes32 digest = registration(
                log,
                logId,
                addressAt(string.concat(one, ".owner")),
                addressAt(string.concat(one, ".submitter")),
                addressAt(string.concat(one, ".payee"))
            );
            assertEq(digest, bytes32At(string.concat(one, ".registration_digest")));
            registerAt(one);
            assertEq(log.ownerOf(logId), addressAt(string.concat(one, ".owner")));
        }
    }

    function test_settlement_attestation_digests() public {
        deployAll();
        assertEq(domainSeparator("OpenLoRA Rewards", address(rewards)), bytes32At("$.rewards_domain_separator"));
        for (uint256 i = 0; i < 3; ++i) {
            string memory one = string.concat("$.attestations[", VM.toString(i), "]");
            bytes32 digest = rewards.attestationDigest(
                uintAt(string.concat(one, ".epoch")),
                bytes32At(string.concat(one, ".root")),
                uintAt(string.concat(one, ".total")),
                allocationsAt(one)
            );
            assertEq(digest, bytes32At(string.concat(one, ".digest")));
        }
    }

    function test_settlement_reward_leaves_roots_and_proofs() public {
        deployAll();
        for (uint256 tree = 0; tree < 4; ++tree) {
            string memory path = string.concat("$.reward_trees[", VM.toString(tree), "]");
            uint256 length = accountsAt(path);
            bytes32 root = bytes32At(string.concat(path, ".root"));
            bytes32[] memory leaves = new bytes32[](length);
            for (uint256 i = 0; i < length; ++i) {
                string memory one = string.concat(path, ".accounts[", VM.toString(i), "]");
                leaves[i] = RewardTree.leafOf(
                    address(rewards),
                    addressAt(string.concat(one, ".account")),
                    uintAt(string.concat(one, ".cumulative"))
                );
                assertEq(leaves[i], bytes32At(string.concat(one, ".leaf")));
                assertTrue(MerkleProof.verify(proofAt(one), root, leaves[i]));
            }
            assertEq(RewardTree.rootOf(leaves), root);
            for (uint256 i = 0; i < length; ++i) {
                string memory one = string.concat(path, ".accounts[", VM.toString(i), "]");
                bytes32[] memory proof = RewardTree.proofOf(leaves, i);
                assertEq(keccak256(abi.encode(proof)), keccak256(abi.encode(proofAt(one))));
            }
        }
    }

    function test_settlement_documents() public {
        deployAll();
        AdapterRegistry registry = new AdapterRegistry(address(this), 0);
        registry.register(
            keccak256("model"), bytes32(0), "name", "uri", VM.parseJsonString(json, "$.documents[0].document")
        );
        (,, bytes32 termsHash,,) = registry.modelOf(address(this), keccak256("model"));
        assertEq(termsHash, bytes32At("$.documents[0].hash"));
        registry.grantRole(registry.PARAMETERS_ROLE(), address(this));
        registry.publishParameters(VM.parseJsonString(json, "$.documents[1].document"));
        (, bytes32 digest,) = registry.parameters();
        assertEq(digest, bytes32At("$.documents[1].hash"));
    }

    /// @dev The contracts themselves take what viem signed and OpenZeppelin's tree proved, from registration to the last claim.
    function test_settlement_first_epoch_end_to_end() public {
        deployAll();
        for (uint256 i = 0; i < 2; ++i) {
            string memory one = string.concat("$.logs[", VM.toString(i), "]");
            registerAt(one);
            bytes32 logId = bytes32At(string.concat(one, ".log_id"));
            anchor(log, logId, 10);
            VM.prank(addressAt("$.deployer"));
            token.mint(address(this), 1000);
            token.approve(address(rewards), 1000);
            rewards.deposit(logId, 1000);
        }
        string memory epoch1 = "$.attestations[0]";
        IRewardDistributor.Allocation[] memory allocations = allocationsAt(epoch1);
        bytes32 root = bytes32At("$.attestations[0].root");
        rewards.propose(root, 1000, allocations);
        VM.warp(block.timestamp + 1);
        bytes[] memory signatures = new bytes[](3);
        for (uint256 i = 0; i < 3; ++i) {
            string memory one = string.concat(epoch1, ".signatures[", VM.toString(i), "]");
            signatures[i] = bytesAt(string.concat(one, ".signature"));
        }
        rewards.accept(1, root, 1000, allocations, signatures);
        for (uint256 i = 0; i < 7; ++i) {
            string memory one = string.concat("$.reward_trees[0].accounts[", VM.toString(i), "]");
            address account = addressAt(string.concat(one, ".account"));
            uint256 cumulative = uintAt(string.concat(one, ".cumulative"));
            rewards.claim(account, cumulative, proofAt(one));
            assertEq(token.balanceOf(account), cumulative);
        }
        assertEq(token.balanceOf(address(rewards)), 1000);
    }

    /// @dev Everything where the vectors say it is; this contract is admin and publisher.
    function deployAll() private {
        json = VM.readFile("../tests/vectors/settlement_v1.json");
        VM.chainId(uintAt("$.chain_id"));
        address deployer = addressAt("$.deployer");
        VM.startPrank(deployer);
        log = new AttributionLog();
        token = new RewardToken(deployer);
        rewards = new RewardDistributor(IERC20(token), log, address(this), 1, 1000, 2);
        VM.stopPrank();
        assertEq(address(log), addressAt("$.attribution_log"));
        assertEq(address(token), addressAt("$.reward_token"));
        assertEq(address(rewards), addressAt("$.distributor"));
        rewards.grantRole(rewards.PUBLISHER_ROLE(), address(this));
        for (uint256 i = 0; i < 3; ++i) {
            string memory one = string.concat("$.attestations[0].signatures[", VM.toString(i), "].signer");
            rewards.grantRole(rewards.ATTESTOR_ROLE(), addressAt(one));
        }
    }

    function registerAt(string memory one) private {
        VM.prank(addressAt(string.concat(one, ".owner")));
        log.registerLog(
            initAt(one),
            addressAt(string.concat(one, ".submitter")),
            addressAt(string.concat(one, ".payee")),
            bytesAt(string.concat(one, ".registration_signature"))
        );
    }

    function initAt(string memory one) private view returns (IAttributionLog.LogInit memory) {
        return IAttributionLog.LogInit({
            originHash: bytes32At(string.concat(one, ".init.origin_hash")),
            signer: addressAt(string.concat(one, ".init.signer")),
            checkpointKey: bytes32At(string.concat(one, ".init.checkpoint_key")),
            nonce: bytes32At(string.concat(one, ".init.nonce")),
            predecessor: bytes32At(string.concat(one, ".init.predecessor"))
        });
    }

    function allocationsAt(string memory one)
        private
        view
        returns (IRewardDistributor.Allocation[] memory allocations)
    {
        uint256 length = 0;
        while (VM.keyExistsJson(json, string.concat(one, ".allocations[", VM.toString(length), "]"))) ++length;
        allocations = new IRewardDistributor.Allocation[](length);
        for (uint256 i = 0; i < length; ++i) {
            string memory path = string.concat(one, ".allocations[", VM.toString(i), "]");
            allocations[i] = IRewardDistributor.Allocation({
                logId: bytes32At(string.concat(path, ".log_id")),
                from: uint64(uintAt(string.concat(path, ".from"))),
                to: uint64(uintAt(string.concat(path, ".to"))),
                amount: uintAt(string.concat(path, ".amount"))
            });
        }
    }

    function accountsAt(string memory path) private view returns (uint256 length) {
        while (VM.keyExistsJson(json, string.concat(path, ".accounts[", VM.toString(length), "]"))) ++length;
    }

    function proofAt(string memory one) private view returns (bytes32[] memory) {
        return VM.parseJsonBytes32Array(json, string.concat(one, ".proof"));
    }

    function receiptOf(string memory one) private view returns (Receipt memory) {
        return Receipt({
            schema: uint16(uintAt(string.concat(one, ".schema"))),
            logId: bytes32At(string.concat(one, ".log_id")),
            seq: uint64(uintAt(string.concat(one, ".seq"))),
            requestId: bytes32At(string.concat(one, ".request_id")),
            status: uint8(uintAt(string.concat(one, ".status"))),
            baseModel: bytes32At(string.concat(one, ".base_model")),
            runtimeHash: bytes32At(string.concat(one, ".runtime_hash")),
            adaptersHash: bytes32At(string.concat(one, ".adapters_hash")),
            termsHash: bytes32At(string.concat(one, ".terms_hash")),
            registryRef: bytes32At(string.concat(one, ".registry_ref")),
            promptCommit: bytes32At(string.concat(one, ".prompt_commit")),
            outputCommit: bytes32At(string.concat(one, ".output_commit")),
            inTokens: uint32(uintAt(string.concat(one, ".in_tokens"))),
            outTokens: uint32(uintAt(string.concat(one, ".out_tokens"))),
            startedAt: uint64(uintAt(string.concat(one, ".started_at"))),
            endedAt: uint64(uintAt(string.concat(one, ".ended_at"))),
            price: uint128(uintAt(string.concat(one, ".price"))),
            paymentRef: bytes32At(string.concat(one, ".payment_ref")),
            computeProof: bytes32At(string.concat(one, ".compute_proof"))
        });
    }

    function signerOf(bytes32 digest, bytes memory signature) private pure returns (address) {
        bytes32 r;
        bytes32 s;
        assembly {
            r := mload(add(signature, 32))
            s := mload(add(signature, 64))
        }
        return ecrecover(digest, uint8(signature[64]), r, s);
    }

    function bytes32At(string memory path) private view returns (bytes32) {
        return VM.parseJsonBytes32(json, path);
    }

    function bytesAt(string memory path) private view returns (bytes memory) {
        return VM.parseBytes(VM.parseJsonString(json, path));
    }

    function addressAt(string memory path) private view returns (address) {
        return VM.parseJsonAddress(json, path);
    }

    function uintAt(string memory path) private view returns (uint256) {
        return VM.parseJsonUint(json, path);
    }
}
